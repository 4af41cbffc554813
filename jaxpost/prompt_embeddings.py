"""Prompts as points: by a model of our families, or by a function of the user's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxpost.data.examples import Example
from jaxpost.data.store import stored
from jaxpost.errors import ConfigError
from jaxpost.models.pretrained import Source, open_source
from jaxpost.models.transformer import Decoder
from jaxpost.objectives.sequences import mean_hidden
from jaxpost.prompt_weights import Embedder
from jaxpost.scoring import each_of
from jaxpost.train.manifest import DIGEST
from jaxpost.train.precompute import weights_digest

EmbeddingFunction = Callable[[list[str]], Any]
OF_A_MODEL, OF_A_FUNCTION = 16384, 256  # prompts at once


def embedder_of(args: Any, function: EmbeddingFunction | None, mesh: Mesh) -> Callable[[], Embedder] | None:
    """What makes the embedder of a run, which is not kept for longer than it is needed; None where there is none.

    Args:
        args: the run's config.
        function: texts -> [N, E], in place of a model.
        mesh: where the weights of a model go.

    Raises:
        ConfigError: the model cannot be opened, or there is a function too.
    """
    if function is not None and args.embedding_model is not None:
        raise ConfigError("embedding_func and embedding_model both embed prompts; give one of them")
    if function is not None:
        return partial(Embedder, function, OF_A_FUNCTION)
    if args.embedding_model is None:
        return None
    return partial(_loaded, open_source(args.embedding_model), args, mesh)


def _loaded(source: Source, args: Any, mesh: Mesh) -> Embedder:
    head = "reward" if source.has_trained_head("reward") else "lm"
    options = {"dtype": args.dtype, "compute": args.compute(), "mesh": mesh}
    model = source.load(head=head, allow_nonfinite=args.allow_nonfinite_weights, **options)
    rows = args.per_device_eval_batch_size
    embed = partial(mean_states, model, source.tokenizer(), batch_size=rows, mesh=mesh)
    return Embedder(embed, OF_A_MODEL, DIGEST + weights_digest(nnx.split(model)[1]))


def mean_states(model: Decoder, tokenizer: Any, texts: list[str], *, batch_size: int, mesh: Mesh) -> np.ndarray:
    """The mean of the last hidden states of each text, float32 [N, D].

    Texts are read as they are: what marks the turns of a chat is there already.
    """
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    examples = (np.array(ids or [0], np.int32) for ids in tokens)  # without a token there would be no row
    store = stored(Example(ids, np.zeros(len(ids), bool)) for ids in examples)
    return each_of(store, mean_hidden, model, batch_size=batch_size, mesh=mesh)
