"""From tokens to heads and back: how devices that each have a slice of the rows attend to whole ones.

An all-to-all before attention gives every device all tokens for a share of the heads, another one after it all heads
for its own tokens (Jacobs et al., 2023, "DeepSpeed Ulysses", arXiv:2309.14509). Each attends to whole rows with any
kernel, however they are packed, and all have the same work to do.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from jaxpost.sharding import constrain, mesh_axes


def to_heads(
    query: Float[Array, "rows H d"], key: Float[Array, "rows K d"], value: Float[Array, "rows K d"]
) -> tuple[Float[Array, "rows H d"], Float[Array, "rows K2 d"], Float[Array, "rows K2 d"]]:
    """Split queries, keys and values by heads, which the axes `tensor` and `context` share.

    Where there are fewer heads of keys than devices, each is repeated for all devices that have queries of its group.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return query, key, value
    axes = mesh_axes("attended", query.shape[1], mesh, path="attention, heads of queries")
    times = math.lcm(key.shape[1], math.prod(mesh.shape[axis] for axis in axes)) // key.shape[1]
    if query.shape[1] % (times * key.shape[1]):
        times = 1

    def moved(x: Array, times: int = 1) -> Array:
        x = jnp.repeat(constrain(x, "tokens", "heads", None), times, axis=1)
        return constrain(constrain(x, "tokens", "heads", None), "batch", "attended", None)

    return moved(query), moved(key, times), moved(value, times)


def by_heads(run: Callable[..., Array], query: Array, key: Array, value: Array, *rows: Array) -> Array:
    """`run` on every device for its own rows and heads; what the mesh does not divide is computed by all.

    Args:
        run: attends.
        query, key, value: [B, K, ...].
        rows: [B, ...] what it needs of the rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(query, key, value, *rows)
    by_row, heads = mesh_axes("batch", len(query), mesh), mesh_axes("attended", query.shape[1], mesh)
    specs = (*[P(by_row, heads)] * 3, *[P(by_row)] * len(rows))
    return jax.shard_map(run, in_specs=specs, out_specs=P(by_row, heads), check_vma=False)(query, key, value, *rows)


def to_tokens(attended: Float[Array, "rows H d"]) -> Float[Array, "rows H d"]:
    """Split what the heads found by tokens again; over `tensor` it stays split by heads."""
    return constrain(constrain(attended, "batch", "attended", None), "tokens", "heads", None)
