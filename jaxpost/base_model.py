"""The model that a run starts from: opened and checked, its weights not read yet."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxpost.data.tokenizer import embedding_rows, num_ids, prepare_tokenizer, special_ids
from jaxpost.errors import ConfigError
from jaxpost.models.adapters import active_config, attach
from jaxpost.models.config import ModelConfig
from jaxpost.models.families import read_config
from jaxpost.models.hf import place
from jaxpost.models.lora_config import LoraConfig
from jaxpost.models.pretrained import named, open_source
from jaxpost.models.resize import resize_embeddings
from jaxpost.models.transformer import Decoder


class BaseModel(NamedTuple):
    """A model with its tokenizer, before the weights are loaded.

    Attributes:
        name: what was asked for, for the model card.
        base: what an adapter's folder names as its base, and its revision.
        config: as it was opened; `load` may give more embedding rows.
        tokenizer: prepared for the run.
        vocab_size: embedding rows that the tokenizer needs.
        generation_config: what is exported with the model.
        notes: for the user.
        adapter: that is trained; None where the whole model is.
        load: the model with what it trains, laid out on the mesh.
    """

    name: str
    base: tuple[str, str | None]
    config: ModelConfig
    tokenizer: Any
    vocab_size: int
    generation_config: dict[str, Any]
    notes: list[str]
    adapter: LoraConfig | None
    load: Callable[[], Decoder]


def open_base(
    model: str | os.PathLike[str] | Decoder | None,
    args: Any,
    tokenizer: Any,
    mesh: Mesh,
    lora: LoraConfig | None = None,
    head: str = "lm",
) -> BaseModel:
    """Find the model of a run and prepare its tokenizer.

    Args:
        model: hub id, folder, .gguf file or a loaded model, which is placed on the mesh; by default
            `args.model_name_or_path`.
        args: the run's config.
        tokenizer: by default the model's.
        mesh: where the weights go.
        lora: a new adapter to train; None to train the whole model, or the adapter that it has.
        head: lm or reward; a new reward head is trained as a whole beside a new adapter.

    Raises:
        ConfigError: there is no such model, or it, its tokenizer and its adapter do not fit.
    """
    model = args.model_name_or_path if model is None else model
    if model is None:
        raise ConfigError("no model: give --model_name_or_path (a hub id, a local folder or a .gguf file)")
    compute, quantization = args.compute(), args.quantization()
    if isinstance(model, Decoder):
        if quantization is not None:
            raise ConfigError("load_in_4bit and load_in_8bit are for loading: give the model by name, or load it so")
        name, base = "a given model", (args.model_name_or_path or "", None)
        if model.head_kind != head:
            raise ConfigError(f"the given model has a head {model.head_kind!r}; load it with head={head!r}")
        config, generation_config, own = model.config, {}, active_config(model)
        build = partial(place, model, compute, mesh)
    else:
        source, name = open_source(named(model, "model"), args.model_revision), str(model)
        base, own = (source.name, source.revision), None if source.adapter is None else source.adapter.config
        config, generation_config = read_config(source.checkpoint.config, name), source.checkpoint.generation_config
        tokenizer = tokenizer or source.tokenizer()
        options = {"head": head, "dtype": args.dtype, "compute": compute, "mesh": mesh, "quantization": quantization}
        build = partial(source.load, allow_nonfinite=args.allow_nonfinite_weights, **options)
    _check_adapter(name, lora, own is not None, quantization)
    if lora is not None and head == "reward" and "score" not in (lora.modules_to_save or ()):
        lora = replace(lora, modules_to_save=[*(lora.modules_to_save or ()), "score"])
    tokenizer = _prepared(tokenizer, args)
    vocab_size, notes = _grown(tokenizer, config.vocab_size, lora)
    if lora is None and args.idle:
        notes.append(f"{', '.join(args.idle)}: set without use_peft, which alone makes an adapter; of no effect")
    special = special_ids(tokenizer, generation_config, config.hf, vocab_size)

    def loaded() -> Decoder:
        grown = build()
        grown = resize_embeddings(grown, max(vocab_size, grown.config.vocab_size))
        grown.config = replace(grown.config, hf={**grown.config.hf, **special})
        return grown if lora is None else attach(grown, lora, seed=args.seed)

    exported, adapter = {**generation_config, **special}, own if lora is None else lora
    return BaseModel(name, base, config, tokenizer, vocab_size, exported, notes, adapter, loaded)


def _prepared(tokenizer: Any, args: Any) -> Any:
    if tokenizer is None:
        raise ConfigError("no tokenizer: give processing_class along with a loaded model")
    if isinstance(tokenizer, str | os.PathLike):
        raise ConfigError(f"processing_class is {str(tokenizer)!r}; give AutoTokenizer.from_pretrained of it")
    return prepare_tokenizer(tokenizer, args)


def _grown(tokenizer: Any, rows: int, lora: LoraConfig | None) -> tuple[int, list[str]]:
    """Embedding rows that a tokenizer needs of a model that has so many, and what a user should know of new ones."""
    needed = embedding_rows(tokenizer, rows)
    if needed <= rows:
        return needed, []
    grown = f"from {rows} to {needed} rows for the tokenizer's {num_ids(tokenizer)} ids"
    if lora is not None and "embed_tokens" not in (lora.modules_to_save or ()):
        raise ConfigError(f"the vocabulary grows {grown}; train them: --lora_modules_to_save embed_tokens lm_head")
    return needed, [f"the vocabulary grew {grown}; new rows are the mean of the old ones"]


def _check_adapter(name: str, lora: LoraConfig | None, has_adapter: bool, quantization: str | None) -> None:
    if has_adapter and lora is not None:
        raise ConfigError(
            f"{name} has an adapter already: leave out --use_peft to go on with it, or merge it first (jaxpost export)"
        )
    if quantization is not None and lora is None and not has_adapter:
        raise ConfigError(
            "kernels in few bits cannot be trained themselves; add --use_peft to train an adapter on them"
        )
