"""Attention behind one signature; kernels are chosen by platform and can be named.

A query sees a key of the same segment at the same or an earlier position. Segments keep packed documents apart;
segment 0 is padding, whose outputs nobody reads.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxpost.options import one_of

BLOCK = 256  # queries
NEGATIVE = -0.7 * jnp.finfo(jnp.float32).max  # finite: a row that sees nothing stays free of NaN


def attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K d"],
    *,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    scale: float,
    kernel: str = "auto",
) -> Float[Array, "B T H d"]:
    """Causal softmax attention with grouped queries (Ainslie et al., 2023, arXiv:2305.13245).

    Raises:
        ConfigError: unknown kernel name.
    """
    chosen = KERNELS[one_of("attn_implementation", kernel, tuple(KERNELS))]
    queries = (query, query_positions, query_segments)
    return chosen(queries, (key, value, key_positions, key_segments), scale)


def _xla(queries: tuple[Array, ...], keys: tuple[Array, ...], scale: float) -> Float[Array, "B T H d"]:
    """Blocks of queries one after the other, recomputed in the backward pass: only a block's scores are ever held."""
    length = queries[0].shape[1]
    if length <= BLOCK:
        return _block(queries, keys, scale)
    room = -length % BLOCK

    def blocks(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, room)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]).swapaxes(0, 1)

    block = jax.checkpoint(lambda part: _block(part, keys, scale), prevent_cse=False)
    outputs = jax.lax.map(block, tuple(blocks(x) for x in queries))
    return outputs.swapaxes(0, 1).reshape(outputs.shape[1], -1, *outputs.shape[3:])[:, :length]


def _block(queries: tuple[Array, ...], keys: tuple[Array, ...], scale: float) -> Float[Array, "B T H d"]:
    """Scores in float32 whatever the inputs; keys and values are never repeated for the query groups."""
    query, query_positions, query_segments = queries
    key, value, key_positions, key_segments = keys
    visible = (query_segments[:, :, None] == key_segments[:, None, :]) & (
        query_positions[:, :, None] >= key_positions[:, None, :]
    )
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, NEGATIVE), axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(batch, length, heads, dim)


Kernel = Callable[[tuple[Array, ...], tuple[Array, ...], float], Array]
KERNELS: dict[str, Kernel] = {"auto": _xla, "xla": _xla}
