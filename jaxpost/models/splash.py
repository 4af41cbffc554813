"""Splash attention: the Pallas kernel for TPU that comes with JAX, on a mesh."""

from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from jaxpost.sharding import BATCH_AXES, batch_groups

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

    Every device attends for its own rows and heads. A row count or a number of key heads that the mesh does not divide
    is computed by all.

    Args:
        softcap: as of `attention`.
        query, key, value: T is a multiple of 128.
        segments: documents of each row.
        residuals: checkpoint name of what the backward pass needs besides its inputs.
        interpret: run the kernel's steps one by one, on any platform; for tests.
    """
    mesh = jax.sharding.get_abstract_mesh()
    run = _kernel(query.shape[2], query.shape[3], softcap, residuals, interpret)
    if mesh.empty:
        return run(query, key, value, segments)
    rows = BATCH_AXES if len(query) % batch_groups(mesh) == 0 else None
    heads = "tensor" if query.shape[1] % mesh.shape["tensor"] == 0 else None
    specs = P(rows, heads), P(rows, heads), P(rows, heads), P(rows)
    return jax.shard_map(run, in_specs=specs, out_specs=P(rows, heads), check_vma=False)(query, key, value, segments)


@lru_cache
def _kernel(groups: int, length: int, softcap: float | None, residuals: str, interpret: bool) -> Any:
    """The kernel over rows [b] and key heads [k] of a device."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    kernel_module, masks = library.splash_attention_kernel, library.splash_attention_mask
    size = next(size for size in TILES if length % size == 0)
    sizes = kernel_module.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    with jax.ensure_compile_time_eval():  # the mask is a constant of every program that uses it
        kernel = kernel_module.make_splash_mqa(
            masks.MultiHeadMask([masks.CausalMask((length, length))] * groups),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name=residuals,
            interpret=interpret,
        )
        kernel = jax.tree.map(np.asarray, kernel)

    def run(query: Array, key: Array, value: Array, segments: Array) -> Array:
        def row(query: Array, key: Array, value: Array, segments: Array) -> Array:
            ids = kernel_module.SegmentIds(segments, segments)
            return jax.vmap(lambda q, k, v: kernel(q, k, v, ids))(query, key, value)

        return jax.vmap(row)(query, key, value, segments).astype(query.dtype)

    return run
