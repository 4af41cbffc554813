"""FlashAttention for GPUs, in Pallas: only the tiles that a row needs (Dao, 2023, arXiv:2307.08691).

Windows, packed documents and branches are as in `models.attention`: each row has a list of the tiles of keys that each
of its tiles of queries needs, and another one the other way round, for the gradients of keys and values. Heads of
queries that share a head of keys read the same arrays.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from jaxpost.models.context import by_heads
from jaxpost.models.views import Views, needed_tiles

TILE = 64  # queries, and keys, of a tile
NEGATIVE = -1e30
OF_KEYS = ("key", "value")  # arrays that have no dimension of queries' heads


def flash(
    softcap: float | None,
    query: Float[Array, "B K G T d"],
    key: Float[Array, "B K T d"],
    value: Float[Array, "B K T d"],
    views: Views,
    window: Int[Array, ""] | None,
    *,
    residuals: str,
    interpret: bool = False,
) -> Float[Array, "B K G T d"]:
    """Causal attention; the scale is in the queries already.

    Args:
        softcap, window: as of `attention`.
        query, key, value: T is a multiple of 128.
        views: what each token sees.
        residuals: checkpoint name of what the backward pass needs besides its inputs.
        interpret: run the kernels' steps one by one, on any platform; for tests.
    """
    dim = query.shape[-1]
    room = [(0, 0), (0, 0), (0, 0), (0, _power(dim) - dim)]  # Triton's tiles are powers of 2
    query, (key, value) = jnp.pad(query, [(0, 0), *room]), (jnp.pad(x, room) for x in (key, value))
    limit = jnp.full(1, jnp.iinfo(jnp.int32).max) if window is None else window.reshape(1).astype(jnp.int32)

    def run(query: Array, key: Array, value: Array, *told: Array) -> Array:
        return _attend((softcap, residuals, interpret), query, key, value, Views(*told[:5]), told[5][0])

    out = by_heads(run, query, key, value, *views, jnp.broadcast_to(limit, (len(query), 1)))
    return out[..., :dim]


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: tuple[float | None, str, bool], query: Array, key: Array, value: Array, views: Views, window: Array
) -> Array:
    return _forward(options, query, key, value, views, window)[0]


def _forward(
    options: tuple[float | None, str, bool], query: Array, key: Array, value: Array, views: Views, window: Array
) -> tuple[Array, tuple]:
    """The result, and the logarithm of each query's mass [B, K, G, T]."""
    softcap, residuals, interpret = options
    told, lists = _told(views, window), _lists(needed_tiles(views, window, TILE))
    statistic = jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32)
    call = _call(partial(_forward_kernel, softcap), "flash_fwd", query.shape, interpret, per_head=True)
    out, mass = call({"query": query, "key": key, "value": value}, told, lists, {"out": query, "mass": statistic})
    out, mass = checkpoint_name(out, residuals), checkpoint_name(mass, residuals)
    return out, (query, key, value, views, window, out, mass)


def _backward(options: tuple[float | None, str, bool], saved: tuple, gradient: Array) -> tuple:
    softcap, _, interpret = options
    query, key, value, views, window, out, mass = saved
    needed = needed_tiles(views, window, TILE)
    told = _told(views, window)
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    given = {"query": query, "key": key, "value": value, "gradient": gradient, "mass": mass, "delta": delta}
    of_queries = _call(partial(_query_kernel, softcap), "flash_dq", query.shape, interpret, per_head=True)
    of_keys = _call(partial(_key_kernel, softcap), "flash_dkv", query.shape, interpret, per_head=False)
    (of_query,) = of_queries(given, told, _lists(needed), {"query": query})
    of_key, of_value = of_keys(given, told, _lists(needed.swapaxes(1, 2)), {"key": key, "value": value})
    return of_query, of_key, of_value, None, None


_attend.defvjp(_forward, _backward)


def _told(views: Views, window: Array) -> Int[Array, "B 5 T"]:
    """What a kernel is told of the tokens: Views but for `begins`, and the window."""
    columns = (views.positions, views.segments, views.trunks, views.starts)
    return jnp.stack([*columns, jnp.broadcast_to(window, views.positions.shape)], axis=1).astype(jnp.int32)


def _lists(needed: Bool[Array, "B tiles others"]) -> Int[Array, "B tiles counted"]:
    """Of each tile: how many others it meets, then their numbers."""
    counts = jnp.sum(needed, axis=2, keepdims=True)
    return jnp.concatenate([counts, jnp.argsort(~needed, axis=2, stable=True)], axis=2).astype(jnp.int32)


def _call(kernel: Callable[..., None], name: str, shape: tuple[int, ...], interpret: bool, *, per_head: bool) -> Any:
    """A kernel whose programs each work at a tile of the queries of a head, or of keys if it is not `per_head`.

    Its arrays are [B, K, T, ...] those that OF_KEYS names, [B, K, G, T, ...] the others.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as library

    batch, kv_heads, groups, length, dim = shape
    grid = (length // TILE, kv_heads * groups if per_head else kv_heads, batch)

    def block(name: str, array: Any, *, tiled: bool) -> Any:
        """What a program sees of an array [B, K, (G), T, (d)]: its head's, all of it or its tile."""
        is_grouped = name not in OF_KEYS
        heads = ((None,) if per_head else (groups,)) if is_grouped else ()
        size = (TILE if tiled else length, *array.shape[3 + is_grouped :])

        def index(tile: Array, head: Array, row: Array) -> tuple[Any, ...]:
            kv_head, group = (head // groups, head % groups) if per_head else (head, 0)
            return (row, kv_head, *([group] if is_grouped else []), tile if tiled else 0, *[0] * (len(size) - 1))

        return pl.BlockSpec((None, None, *heads, *size), index)

    def call(given: dict[str, Array], told: Array, lists: Array, results: dict[str, Any]) -> Any:
        in_specs = [block(name, array, tiled=False) for name, array in given.items()]
        in_specs.append(pl.BlockSpec((None, *told.shape[1:]), lambda tile, head, row: (row, 0, 0)))
        in_specs.append(pl.BlockSpec((None, None, lists.shape[2]), lambda tile, head, row: (row, tile, 0)))
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=in_specs,
            out_specs=[block(name, array, tiled=True) for name, array in results.items()],
            out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in results.values()],
            compiler_params=library.CompilerParams(num_warps=4 if dim <= 64 else 8, num_stages=2),
            interpret=interpret,
            name=name,
        )(*given.values(), told, lists)

    return call


def _forward_kernel(
    softcap: float | None, query: Any, key: Any, value: Any, told: Any, others: Any, out: Any, mass: Any
) -> None:
    """A tile of queries, over the tiles of keys that it needs: running maximum, mass and weighted sum."""
    queries = _tile_at(_own_tile())
    tile = query[queries, :]

    def add(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        keys, (peak, total, weighted) = _tile_at(others[number + 1]), sums
        scores, _ = _scores(softcap, tile, key[keys, :], told, queries, keys)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp(scores - new_peak[:, None]), jnp.exp(peak - new_peak)
        part = _dot(weights.astype(value.dtype), value[keys, :])
        return new_peak, total * shrink + jnp.sum(weights, axis=1), weighted * shrink[:, None] + part

    empty = jnp.full(TILE, NEGATIVE, jnp.float32), jnp.zeros(TILE, jnp.float32), jnp.zeros(tile.shape, jnp.float32)
    peak, total, weighted = lax.fori_loop(0, others[0], add, empty)
    out[:, :] = (weighted / total[:, None]).astype(out.dtype)
    mass[:] = peak + jnp.log(total)


def _query_kernel(softcap: float | None, *arguments: Any) -> None:
    """The gradient of a tile of queries."""
    query, key, value, gradient, mass, delta, told, others, out = arguments
    queries = _tile_at(_own_tile())
    tile, of_out, own_mass, own_delta = query[queries, :], gradient[queries, :], mass[queries], delta[queries]

    def add(number: Array, total: Array) -> Array:
        keys = _tile_at(others[number + 1])
        tile_key = key[keys, :]
        scores, slope = _scores(softcap, tile, tile_key, told, queries, keys)
        weights = jnp.exp(scores - own_mass[:, None])
        of_scores = weights * (_dot(of_out, value[keys, :], trans_b=True) - own_delta[:, None]) * slope
        return total + _dot(of_scores.astype(tile_key.dtype), tile_key)

    total = lax.fori_loop(0, others[0], add, jnp.zeros(tile.shape, jnp.float32))
    out[:, :] = total.astype(out.dtype)


def _key_kernel(softcap: float | None, *arguments: Any) -> None:
    """The gradients of a tile of keys and of its values, over the heads of queries that share them."""
    query, key, value, gradient, mass, delta, told, others, of_key, of_value = arguments
    keys = _tile_at(_own_tile())
    tile_key, tile_value, count = key[keys, :], value[keys, :], others[0]

    def add(number: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        group, queries = number // count, _tile_at(others[number % count + 1])
        tile, of_out = query[group, queries, :], gradient[group, queries, :]
        scores, slope = _scores(softcap, tile, tile_key, told, queries, keys)
        weights = jnp.exp(scores - mass[group, queries][:, None])
        of_weights = _dot(of_out, tile_value, trans_b=True)
        of_scores = weights * (of_weights - delta[group, queries][:, None]) * slope
        return (
            sums[0] + _dot(of_scores.astype(tile.dtype), tile, trans_a=True),
            sums[1] + _dot(weights.astype(of_out.dtype), of_out, trans_a=True),
        )

    empty = jnp.zeros(tile_key.shape, jnp.float32)
    total_key, total_value = lax.fori_loop(0, count * query.shape[0], add, (empty, empty))
    of_key[:, :], of_value[:, :] = total_key.astype(of_key.dtype), total_value.astype(of_value.dtype)


def _scores(
    softcap: float | None, query: Array, key: Array, told: Any, queries: Any, keys: Any
) -> tuple[Array, Array | float]:
    """Masked scores of a tile, and their derivative by the scores before the soft cap."""
    segments, positions = told[1, keys][None, :], told[0, keys][None, :]
    distance = told[0, queries][:, None] - positions
    visible = (told[1, queries][:, None] == segments) & (distance >= 0)
    visible |= (told[2, queries][:, None] == segments) & (positions < told[3, queries][:, None])
    visible &= distance < told[4, queries][:, None]
    scores = _dot(query, key, trans_b=True)
    slope: Array | float = 1.0
    if softcap is not None:
        # tanh by exp, which Triton has on every GPU
        bent = 1 - 2 / (jnp.exp(2 / softcap * scores) + 1)
        scores, slope = softcap * bent, 1 - bent * bent
    return jnp.where(visible, scores, NEGATIVE), slope


def _dot(a: Array, b: Array, **options: bool) -> Array:
    from jax.experimental.pallas import triton as library

    return library.dot(a, b, **options).astype(jnp.float32)


def _own_tile() -> Array:
    from jax.experimental import pallas as pl

    return pl.program_id(0)


def _tile_at(number: Array) -> Any:
    from jax.experimental import pallas as pl

    return pl.ds(number * TILE, TILE)
