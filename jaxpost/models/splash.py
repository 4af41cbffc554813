"""Splash attention: the Pallas kernel for TPU that comes with JAX, on a mesh."""

from typing import Any

import jax
from jax import Array
from jaxtyping import Float, Int

from jaxpost.models.context import by_heads

LEAST_LENGTH = 1024  # tokens of a row; below, what a tile costs to start is not worth it
TILES = (512, 256, 128)  # queries, and keys, of a tile: the largest that divides the row is taken


def splash(
    softcap: float | None,
    query: Float[Array, "B K G T d"],
    key: Float[Array, "B K T d"],
    value: Float[Array, "B K T d"],
    segments: Int[Array, "B T"],
    *,
    residuals: str,
    interpret: bool = False,
) -> Float[Array, "B K G T d"]:
    """Causal attention within segments that each stand in one piece; the scale is in the queries already.

    Every device attends for its own rows and heads.

    Args:
        softcap: as of `attention`.
        query, key, value: T is a multiple of 128.
        segments: documents of each row.
        residuals: checkpoint name of what the backward pass needs besides its inputs.
        interpret: run the kernel's steps one by one, on any platform; for tests.
    """

    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    def run(query: Array, key: Array, value: Array, segments: Array) -> Array:
        kernel = _kernel(query.shape[2], query.shape[3], softcap, residuals, interpret)

        def row(query: Array, key: Array, value: Array, segments: Array) -> Array:
            return jax.vmap(kernel, in_axes=(0, 0, 0, None))(query, key, value, SegmentIds(segments, segments))

        return jax.vmap(row)(query, key, value, segments).astype(query.dtype)

    return by_heads(run, query, key, value, segments)


def _kernel(groups: int, length: int, softcap: float | None, residuals: str, interpret: bool) -> Any:
    """The kernel of the queries [G, T, d] that share a head of keys and values [T, d]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    size = tile(length)
    sizes = library.BlockSizes(
        block_q=size, block_kv=size, block_q_dq=size, block_kv_dq=size, block_q_dkv=size, block_kv_dkv=size
    )
    return library.make_splash_mqa(
        library.MultiHeadMask([library.CausalMask((length, length))] * groups),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=residuals,
        interpret=interpret,
    )


def tile(length: int) -> int:
    """Queries, and keys, of a tile of rows of so many tokens."""
    return next(size for size in TILES if length % size == 0)
