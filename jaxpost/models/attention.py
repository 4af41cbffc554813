"""Attention behind one signature; kernels are chosen by platform and can be named.

A query sees a key of the same segment at the same or an earlier position, no further back than the layer's window.
Segments keep packed documents apart; segment 0 is padding, whose outputs nobody reads. Within a segment positions
count up by one from token to token. A document's first segment begins at position 0. One that begins further on is a
branch: it continues what the document's first segment says before that position, so that a prompt is read once for all
its completions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from jaxpost.errors import ConfigError
from jaxpost.models.splash import LEAST_LENGTH, splash
from jaxpost.options import one_of
from jaxpost.platform import platform

BLOCK = 128  # queries, and keys, of a tile of the XLA kernel
NEGATIVE = -1e30  # finite: a row that sees nothing stays free of NaN
RESIDUALS = "attention"  # checkpoint name of what the backward pass needs besides its inputs


class Places(NamedTuple):
    """Where the tokens of a row stand: who sees whom.

    Attributes:
        positions: [B, T] place in the document.
        segments: [B, T] number of the segment; 0 is padding.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]


class Views(NamedTuple):
    """What each token sees.

    Attributes:
        positions, segments: as of Places.
        trunks: [B, T] the first segment of its document.
        starts: [B, T] tokens of the trunk that it sees although it stands in a branch; 0 in the trunk itself.
        begins: [B, T] index in the row of its document's first token.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    trunks: Int[Array, "B T"]
    starts: Int[Array, "B T"]
    begins: Int[Array, "B T"]


def views_of(places: Places) -> Views:
    """Find the documents of rows, and where they branch."""
    positions, segments = places
    index = jnp.broadcast_to(jnp.arange(positions.shape[1]), positions.shape)
    first = (segments != jnp.roll(segments, 1, axis=1)) | (index == 0)
    opens = (first & (positions == 0)) | (segments == 0)
    begins, of_segment = (lax.cummax(jnp.where(x, index, 0), axis=1) for x in (opens, first))
    starts = jnp.where(of_segment > begins, jnp.take_along_axis(positions, of_segment, axis=1), 0)
    return Views(positions, segments, jnp.take_along_axis(segments, begins, axis=1), starts, begins)


def attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B T K d"],
    value: Float[Array, "B T K d"],
    places: Places,
    *,
    scale: float,
    window: Int[Array, ""] | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
    branches: bool = True,
) -> Float[Array, "B T H d"]:
    """Causal softmax attention of rows to themselves, with grouped queries (Ainslie et al., 2023, arXiv:2305.13245).

    Args:
        query, key, value: H heads of queries share K heads of keys and values.
        places: who sees whom.
        scale: multiplies the scores.
        window: tokens that a query sees, itself included; None for all (Beltagy et al., 2020, arXiv:2004.05150).
        softcap: scores s become softcap * tanh(s / softcap) (Gemma Team, 2024, arXiv:2408.00118, section 2).
        kernel: a name of KERNELS, or `auto` for what suits the platform.
        branches: whether a document may branch.

    Raises:
        ConfigError: unknown kernel name, or one that is for another platform.
    """
    run = KERNELS[_chosen(kernel, query.shape[1], plain=window is None and not branches)]
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    room = -length % min(BLOCK, length)
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    pad = [(0, 0)] * 3 + [(0, room), (0, 0)]
    query, key, value = (jnp.pad(x, pad) for x in (grouped, *(x.swapaxes(1, 2)[:, :, None] for x in (key, value))))
    views = views_of(Places(*(jnp.pad(x, pad[2:4]) for x in places)))
    out = run(softcap, query * scale, key[:, :, 0], value[:, :, 0], views, window)
    return out[:, :, :, :length].transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


def attend_cache(
    query: Float[Array, "B H d"],
    keys: Float[Array, "B K S d"],
    values: Float[Array, "B K S d"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B H d"]:
    """Attention of one new token a row to the first `lengths` slots of its cache; scores in float32.

    All of the cache is read, since XLA on CPU copies what is sliced out of it.
    """
    grouped = query.reshape(len(query), keys.shape[1], -1, query.shape[2])
    # In this order of the dimensions XLA on CPU needs no transposed copies of the cache.
    scores = jnp.einsum("bkgd,bksd->bksg", grouped, keys, preferred_element_type=jnp.float32) * scale
    scores = _capped(scores, softcap)
    slots = jnp.arange(keys.shape[2])
    visible = slots < lengths[:, None]
    if window is not None:
        visible &= slots >= lengths[:, None] - window
    weights = jax.nn.softmax(jnp.where(visible[:, None, :, None], scores, NEGATIVE), axis=2).astype(values.dtype)
    return jnp.einsum("bksg,bksd->bkgd", weights, values).reshape(query.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(
    softcap: float | None,
    query: Float[Array, "B K G T d"],
    key: Float[Array, "B K T d"],
    value: Float[Array, "B K T d"],
    views: Views,
    window: Int[Array, ""] | None,
) -> Float[Array, "B K G T d"]:
    """FlashAttention in plain XLA (Dao et al., 2022, arXiv:2205.14135): tiles of scores, none kept.

    Tiles above the diagonal, beyond the window and of other documents or branches only are skipped at run time.
    """
    return _tiled_forward(softcap, query, key, value, views, window)[0]


def _tiled_forward(
    softcap: float | None, query: Array, key: Array, value: Array, views: Views, window: Array | None
) -> tuple[Array, tuple]:
    """Running maximum, mass and weighted sum over the tiles of keys; row statistics are [B, K, G, T, 1]."""
    size = min(BLOCK, query.shape[3])
    tiles = _seen_tiles(views, window, size)
    tile_scores = partial(_scores, softcap, window, size)

    def row(index: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        tile_query = _window(query, index, size)

        def column(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            other, (peak, mass, out) = tiles.numbers[index, number], sums
            scores, _ = tile_scores(tile_query, key, views, index, other)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new_peak), jnp.exp(peak - new_peak)
            part = _matmul("bkgts,bksd->bkgtd", weights.astype(value.dtype), _window(value, other, size))
            return new_peak, mass * shrink + jnp.sum(weights, axis=-1, keepdims=True), out * shrink + part

        statistic = (*tile_query.shape[:-1], 1)
        empty = (jnp.full(statistic, NEGATIVE), jnp.zeros(statistic), jnp.zeros(tile_query.shape))
        peak, mass, out = lax.fori_loop(0, tiles.counts[index], column, empty)
        new = (out / mass).astype(query.dtype), peak + jnp.log(mass)
        whole, normalizer = (_put_window(old, part, index, size) for old, part in zip(results, new, strict=True))
        return whole, normalizer

    start = (jnp.zeros_like(query), jnp.zeros((*query.shape[:-1], 1), jnp.float32))
    out, normalizer = lax.fori_loop(0, query.shape[3] // size, row, start)
    out, normalizer = checkpoint_name(out, RESIDUALS), checkpoint_name(normalizer, RESIDUALS)
    return out, (query, key, value, views, window, out, normalizer)


def _tiled_backward(softcap: float | None, saved: tuple, gradient: Array) -> tuple[Array, Array, Array, None, None]:
    query, key, value, views, window, out, normalizer = saved
    size = min(BLOCK, query.shape[3])
    tiles = _seen_tiles(views, window, size)
    tile_scores = partial(_scores, softcap, window, size)
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def row(index: Array, gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        of_query, of_key, of_value = gradients
        tile_query, tile_gradient, tile_normalizer, tile_delta = (
            _window(x, index, size) for x in (query, gradient, normalizer, delta)
        )

        def column(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            other, (of_tile, of_key, of_value) = tiles.numbers[index, number], sums
            tile_key, tile_value = _window(key, other, size), _window(value, other, size)
            scores, slope = tile_scores(tile_query, key, views, index, other)
            weights = jnp.exp(scores - tile_normalizer)
            of_weights = _matmul("bkgtd,bksd->bkgts", tile_gradient, tile_value)
            of_scores = (weights * (of_weights - tile_delta) * slope).astype(query.dtype)
            add_key = _matmul("bkgts,bkgtd->bksd", of_scores, tile_query)
            add_value = _matmul("bkgts,bkgtd->bksd", weights.astype(query.dtype), tile_gradient)
            return (
                of_tile + _matmul("bkgts,bksd->bkgtd", of_scores, tile_key),
                _put_window(of_key, _window(of_key, other, size) + add_key, other, size),
                _put_window(of_value, _window(of_value, other, size) + add_value, other, size),
            )

        begin = (jnp.zeros(tile_query.shape), of_key, of_value)
        of_tile, of_key, of_value = lax.fori_loop(0, tiles.counts[index], column, begin)
        return _put_window(of_query, of_tile.astype(query.dtype), index, size), of_key, of_value

    start = (jnp.zeros_like(query), jnp.zeros(key.shape), jnp.zeros(value.shape))
    of_query, of_key, of_value = lax.fori_loop(0, query.shape[3] // size, row, start)
    return of_query, of_key.astype(key.dtype), of_value.astype(value.dtype), None, None


_tiled.defvjp(_tiled_forward, _tiled_backward)


class SeenTiles(NamedTuple):
    """The tiles of keys that each tile of queries needs.

    Attributes:
        numbers: [tiles, tiles] in each row those that are needed come first, in order.
        counts: [tiles] how many they are.
    """

    numbers: Int[Array, "tiles tiles"]
    counts: Int[Array, "tiles"]


def _seen_tiles(views: Views, window: Array | None, size: int) -> SeenTiles:
    """Which tiles any row needs: those that may hold tokens of the same segments, or of the trunks of branches."""
    tiled = Views(*(x.reshape(len(x), -1, size) for x in views))
    begins = tiled.begins if window is None else tiled.begins + jnp.maximum(tiled.positions - window + 1, 0)
    lows, highs = _range(tiled.segments, tiled.segments > 0)
    trunk_lows, trunk_highs = _range(tiled.trunks, tiled.starts > 0)
    shared = (lows[:, :, None] <= highs[:, None]) & (highs[:, :, None] >= lows[:, None])
    shared |= (trunk_lows[:, :, None] <= highs[:, None]) & (trunk_highs[:, :, None] >= lows[:, None])
    order = jnp.arange(tiled.segments.shape[1])
    within = (order + 1) * size > jnp.min(begins, axis=2)[:, :, None]
    needed = (jnp.any(shared & within, axis=0) & (order < order[:, None])) | (order == order[:, None])
    return SeenTiles(jnp.argsort(~needed, axis=1, stable=True), jnp.sum(needed, axis=1))


def _range(values: Int[Array, "B tiles size"], mask: Array) -> tuple[Int[Array, "B tiles"], Int[Array, "B tiles"]]:
    """Least and greatest value of each tile where the mask is True; an empty range where it never is."""
    limit = jnp.iinfo(values.dtype).max
    return jnp.min(jnp.where(mask, values, limit), axis=2), jnp.max(jnp.where(mask, values, -limit), axis=2)


def _scores(
    softcap: float | None,
    window: Array | None,
    size: int,
    query: Array,
    key: Array,
    views: Views,
    row: Array,
    column: Array,
) -> tuple[Array, Array | float]:
    """Masked float32 scores of a tile, and their derivative by the scores before the soft cap."""
    ours, theirs = (Views(*(lax.dynamic_slice_in_dim(x, i * size, size, axis=1) for x in views)) for i in (row, column))
    segments, positions = theirs.segments[:, None, :], theirs.positions[:, None, :]
    distance = ours.positions[:, :, None] - positions
    visible = (ours.segments[:, :, None] == segments) & (distance >= 0)
    visible |= (ours.trunks[:, :, None] == segments) & (positions < ours.starts[:, :, None])
    if window is not None:
        visible &= distance < window
    scores = _capped(_matmul("bkgtd,bksd->bkgts", query, _window(key, column, size)), softcap)
    slope = 1.0 if softcap is None else 1 - (scores / softcap) ** 2
    return jnp.where(visible[:, None, None], scores, NEGATIVE), slope


def _capped(scores: Array, softcap: float | None) -> Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _matmul(formula: str, a: Array, b: Array) -> Array:
    """Grouped einsum as one batched matrix product a key head: XLA on CPU runs it twice as fast as five dimensions."""
    left, right = formula.split("->")[0].split(",")
    groups, tokens = a.shape[2:4]
    flat_a = a.reshape(*a.shape[:2], groups * tokens, a.shape[4])
    if "g" in right:  # contracts the queries away
        flat_b = b.reshape(*b.shape[:2], groups * tokens, b.shape[4])
        return jnp.einsum("bkqs,bkqd->bksd", flat_a, flat_b, preferred_element_type=jnp.float32)
    inner = "bkqd,bksd->bkqs" if left.endswith("d") else "bkqs,bksd->bkqd"
    out = jnp.einsum(inner, flat_a, b, preferred_element_type=jnp.float32)
    return out.reshape(*a.shape[:4], out.shape[-1])


def _window(x: Array, index: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis=x.ndim - 2)


def _put_window(whole: Array, part: Array, index: Array, size: int) -> Array:
    return lax.dynamic_update_slice_in_dim(whole, part, index * size, axis=whole.ndim - 2)


def _splash(softcap: float | None, query: Array, key: Array, value: Array, views: Views, window: None) -> Array:
    return splash(softcap, query, key, value, views.segments, residuals=RESIDUALS)


KERNELS: dict[str, Callable[..., Any]] = {"xla": _tiled, "splash": _splash}
ATTENTION = ("auto", *KERNELS)


def _chosen(name: str, length: int, *, plain: bool) -> str:
    """The kernel for rows of so many tokens; `plain` where a query sees all that is before it in its segment."""
    on = platform()
    if one_of("attn_implementation", name, ATTENTION) == "auto":
        return "splash" if on == "tpu" and plain and length >= LEAST_LENGTH else "xla"
    if name == "splash" and on != "tpu":
        raise ConfigError(f"attn_implementation splash is for TPUs, and this is a {on}; leave it out")
    return name if plain else "xla"
