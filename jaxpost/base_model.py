"""The model that a run starts from: opened and checked, its weights not read yet."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxpost.data.tokenizer import embedding_rows, num_ids, prepare_tokenizer, special_ids
from jaxpost.errors import ConfigError
from jaxpost.models.checkpoint import open_checkpoint
from jaxpost.models.config import ModelConfig
from jaxpost.models.families import read_config
from jaxpost.models.hf import load, place
from jaxpost.models.resize import resize_embeddings
from jaxpost.models.transformer import Decoder


class BaseModel(NamedTuple):
    """A model with its tokenizer, before the weights are loaded.

    Attributes:
        name: for the model card.
        config: as it was opened; `load` may give more embedding rows.
        tokenizer: prepared for the run.
        vocab_size: embedding rows that the tokenizer needs.
        generation_config: what is exported with the model.
        notes: for the user.
        load: the model, laid out on the mesh.
    """

    name: str
    config: ModelConfig
    tokenizer: Any
    vocab_size: int
    generation_config: dict[str, Any]
    notes: list[str]
    load: Callable[[], Decoder]


def open_base(model: str | os.PathLike[str] | Decoder | None, args: Any, tokenizer: Any, mesh: Mesh) -> BaseModel:
    """Find the model of a run and prepare its tokenizer.

    Args:
        model: hub id, folder, .gguf file or a loaded model, which is placed on the mesh; by default
            `args.model_name_or_path`.
        args: the run's config.
        tokenizer: by default the model's.
        mesh: where the weights go.

    Raises:
        ConfigError: there is no such model, or it and the tokenizer do not fit.
    """
    model = args.model_name_or_path if model is None else model
    if model is None:
        raise ConfigError("no model: give --model_name_or_path (a hub id, a local folder or a .gguf file)")
    compute = args.compute()
    if isinstance(model, Decoder):
        name, config, generation_config = "a given model", model.config, {}
        build = partial(place, model, compute, mesh)
    else:
        checkpoint, name = open_checkpoint(model, args.model_revision), str(model)
        config, generation_config = read_config(checkpoint.config, name), checkpoint.generation_config
        tokenizer = tokenizer or checkpoint.tokenizer()
        options = {"dtype": args.dtype, "compute": compute, "mesh": mesh}
        build = partial(load, checkpoint, name, allow_nonfinite=args.allow_nonfinite_weights, **options)
    if tokenizer is None:
        raise ConfigError("no tokenizer: give processing_class along with a loaded model")
    tokenizer = prepare_tokenizer(tokenizer, args)
    vocab_size, notes = embedding_rows(tokenizer, config.vocab_size), []
    if vocab_size > config.vocab_size:
        grown = f"from {config.vocab_size} to {vocab_size} rows for the tokenizer's {num_ids(tokenizer)} ids"
        notes.append(f"the vocabulary grew {grown}; new rows are the mean of the old ones")
    special = special_ids(tokenizer, generation_config, config.hf, vocab_size)

    def loaded() -> Decoder:
        grown = resize_embeddings(build(), vocab_size)
        grown.config = replace(grown.config, hf={**grown.config.hf, **special})
        return grown

    return BaseModel(name, config, tokenizer, vocab_size, {**generation_config, **special}, notes, loaded)
