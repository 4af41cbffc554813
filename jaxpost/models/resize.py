"""A vocabulary that grows: rows for new tokens in the embedding, and columns in the head."""

import dataclasses
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float

from jaxpost.errors import ConfigError
from jaxpost.models.transformer import Decoder
from jaxpost.sharding import parameter_spec


def resize_embeddings(model: Decoder, num_tokens: int, multiple: int = 1) -> Decoder:
    """Let a model read and write at least `num_tokens` tokens, in place.

    New rows of the embedding [V, D], and new columns of a head [D, V] of its own, are the mean of the old ones, taken
    in float32: a new token then has at most the average probability of the old ones, so that texts stay what they were
    (Hewitt, 2021, "Initializing New Word Embeddings for Pretrained Language Models"). Dtype and mesh stay.

    Args:
        model: a decoder; a reward model has no columns for tokens.
        num_tokens: the least new size.
        multiple: the new size is rounded up to a multiple of it.

    Returns:
        The same model.

    Raises:
        ConfigError: fewer tokens than before. Models are often made with rows to spare, and a token may use them.
    """
    old, size = model.config.vocab_size, num_tokens + -num_tokens % multiple
    if size < old:
        raise ConfigError(f"the model has {old} tokens and cannot shrink to {size}; keep the spare ones")
    if size == old:
        return model
    model.embed.embedding = _grown(model.embed.embedding, "embed.embedding", size, axis=0)
    if model.head is not None and model.head_kind == "lm":
        model.head.kernel = _grown(model.head.kernel, "head.kernel", size, axis=1)
    hf = {**model.config.hf, "vocab_size": size}
    model.config = model.layers.config = dataclasses.replace(model.config, vocab_size=size, hf=hf)
    return model


def _grown(parameter: nnx.Param, path: str, size: int, axis: int) -> nnx.Param:
    """The parameter with `size` entries along `axis`, laid out on its mesh as the sharding table has it."""
    old = parameter[...]
    shape = tuple(size if dim == axis else length for dim, length in enumerate(old.shape))
    layout = old.sharding
    if isinstance(layout, NamedSharding):
        mesh = cast(Mesh, layout.mesh)  # of real devices, since the array is on them
        layout = NamedSharding(mesh, parameter_spec(path, shape, mesh))
    return nnx.Param(jax.jit(partial(_extend, size=size, axis=axis), out_shardings=layout)(old))


def _extend(old: Float[Array, "..."], size: int, axis: int) -> Float[Array, "..."]:
    mean = jnp.mean(old, axis=axis, keepdims=True, dtype=jnp.float32).astype(old.dtype)
    shape = tuple(size - length if dim == axis else length for dim, length in enumerate(old.shape))
    return jnp.concatenate([old, jnp.broadcast_to(mean, shape)], axis=axis)
