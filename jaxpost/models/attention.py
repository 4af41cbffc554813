"""Attention behind one signature; kernels are chosen by platform and can be named.

A query sees a key of the same segment at the same or an earlier position, no further back than the layer's window.
Segments keep packed documents apart; segment 0 is padding, whose outputs nobody reads. Within a segment positions
count up by one from token to token. A document's first segment begins at position 0. One that begins further on is a
branch: it continues what the document's first segment says before that position, so that a prompt is read once for all
its completions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from jaxpost.errors import ConfigError
from jaxpost.models.flash import flash
from jaxpost.models.product import kept
from jaxpost.models.softmax import exp
from jaxpost.models.splash import LEAST_LENGTH, splash
from jaxpost.models.tiles import BLOCK, Columns, Span, padded, tiles_of
from jaxpost.models.views import Places, Views, views_of
from jaxpost.options import one_of
from jaxpost.platform import platform

NEGATIVE = -1e30  # finite: a row that sees nothing stays free of NaN
RESIDUALS = "attention"  # checkpoint name of what the backward pass needs besides its inputs


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
    run = KERNELS[_chosen(kernel, query, plain=window is None and not branches)]
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    room = padded(length) - length
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    pad = [(0, 0)] * 3 + [(0, room), (0, 0)]
    query, key, value = (jnp.pad(x, pad) for x in (grouped, *(x.swapaxes(1, 2)[:, :, None] for x in (key, value))))
    views = views_of(Places(*(jnp.pad(x, pad[2:4]) for x in places)))
    out = run(softcap, query * scale, key[:, :, 0], value[:, :, 0], views, window)
    return out[:, :, :, :length].transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


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

    Tiles above the diagonal are skipped; in long rows those beyond the window, and of other documents or branches
    only, are skipped at run time.
    """
    return _tiled_forward(softcap, query, key, value, views, window)[0]


def _tiled_forward(
    softcap: float | None, query: Array, key: Array, value: Array, views: Views, window: Array | None
) -> tuple[Array, tuple]:
    """Maximum, then mass and weighted sum, over the tiles of keys; row statistics are [B, K, G, T, 1]."""
    tiles, tile_scores = tiles_of(views, window), partial(_scores, softcap, window)

    def row(ours: Span, columns: Columns, results: tuple[Array, Array]) -> tuple[Array, Array]:
        tile_query = _part(query, ours)

        # The peak of all tiles comes first: weights, and their rounding, then do not depend on how rows were tiled.
        def higher(theirs: Span, peak: Array) -> Array:
            scores, _ = tile_scores(tile_query, key, views, ours, theirs)
            return jnp.maximum(peak, jnp.max(scores, axis=-1, keepdims=True))

        statistic = (*tile_query.shape[:-1], 1)
        peak = columns(higher, jnp.full(statistic, NEGATIVE))

        def column(theirs: Span, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            mass, out = sums
            scores, _ = tile_scores(tile_query, key, views, ours, theirs)
            weights = exp(scores - peak)
            part = _matmul("bkgts,bksd->bkgtd", weights.astype(value.dtype), _part(value, theirs))
            return mass + tiles.total(weights), out + part

        mass, out = columns(column, (jnp.zeros(statistic), jnp.zeros(tile_query.shape)))
        new = (out / mass).astype(query.dtype), peak + jnp.log(mass)
        whole, normalizer = (_put(old, part, ours) for old, part in zip(results, new, strict=True))
        return whole, normalizer

    out, normalizer = tiles.rows(row, (jnp.zeros_like(query), jnp.zeros((*query.shape[:-1], 1), jnp.float32)))
    out, normalizer = kept(out, RESIDUALS), kept(normalizer, RESIDUALS)
    return out, (query, key, value, views, window, out, normalizer)


def _tiled_backward(softcap: float | None, saved: tuple, gradient: Array) -> tuple[Array, Array, Array, None, None]:
    query, key, value, views, window, out, normalizer = saved
    tiles, tile_scores = tiles_of(views, window), partial(_scores, softcap, window)
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def row(ours: Span, columns: Columns, gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        of_query, of_key, of_value = gradients
        tile_query, tile_gradient, tile_normalizer, tile_delta = (
            _part(x, ours) for x in (query, gradient, normalizer, delta)
        )

        def column(theirs: Span, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            of_tile, of_key, of_value = sums
            tile_key, tile_value = _part(key, theirs), _part(value, theirs)
            scores, slope = tile_scores(tile_query, key, views, ours, theirs)
            weights = exp(scores - tile_normalizer)
            of_weights = _matmul("bkgtd,bksd->bkgts", tile_gradient, tile_value)
            of_scores = (weights * (of_weights - tile_delta) * slope).astype(query.dtype)
            add_key = _matmul("bkgts,bkgtd->bksd", of_scores, tile_query)
            add_value = _matmul("bkgts,bkgtd->bksd", weights.astype(query.dtype), tile_gradient)
            return (
                of_tile + _matmul("bkgts,bksd->bkgtd", of_scores, tile_key),
                _put(of_key, _part(of_key, theirs) + add_key, theirs),
                _put(of_value, _part(of_value, theirs) + add_value, theirs),
            )

        of_tile, of_key, of_value = columns(column, (jnp.zeros(tile_query.shape), of_key, of_value))
        return _put(of_query, of_tile.astype(query.dtype), ours), of_key, of_value

    start = (jnp.zeros_like(query), jnp.zeros(key.shape), jnp.zeros(value.shape))
    of_query, of_key, of_value = tiles.rows(row, start)
    return of_query, of_key.astype(key.dtype), of_value.astype(value.dtype), None, None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _scores(
    softcap: float | None, window: Array | None, query: Array, key: Array, views: Views, row: Span, column: Span
) -> tuple[Array, Array | float]:
    """Masked float32 scores of a tile, and their derivative by the scores before the soft cap."""
    ours, theirs = (Views(*(lax.dynamic_slice_in_dim(x, *span, axis=1) for x in views)) for span in (row, column))
    segments, positions = theirs.segments[:, None, :], theirs.positions[:, None, :]
    distance = ours.positions[:, :, None] - positions
    visible = (ours.segments[:, :, None] == segments) & (distance >= 0)
    visible |= (ours.trunks[:, :, None] == segments) & (positions < ours.starts[:, :, None])
    if window is not None:
        visible &= distance < window
    scores = capped(_matmul("bkgtd,bksd->bkgts", query, _part(key, column)), softcap)
    slope = 1.0 if softcap is None else 1 - (scores / softcap) ** 2
    return jnp.where(visible[:, None, None], scores, NEGATIVE), slope


def capped(scores: Array, softcap: float | None) -> Array:
    """Scores within `softcap` of 0; as they are without one."""
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


def _part(x: Array, span: Span) -> Array:
    return lax.dynamic_slice_in_dim(x, *span, axis=x.ndim - 2)


def _put(whole: Array, part: Array, span: Span) -> Array:
    return lax.dynamic_update_slice_in_dim(whole, part, span.begin, axis=whole.ndim - 2)


def _splash(softcap: float | None, query: Array, key: Array, value: Array, views: Views, window: None) -> Array:
    return splash(softcap, query, key, value, views.segments, residuals=RESIDUALS)


def _flash(softcap: float | None, query: Array, key: Array, value: Array, views: Views, window: Array | None) -> Array:
    return flash(softcap, query, key, value, views, window, residuals=RESIDUALS)


KERNELS: dict[str, Callable[..., Any]] = {"xla": _tiled, "splash": _splash, "flash": _flash}
PLATFORMS = {"splash": "tpu", "flash": "cuda"}  # of kernels that are for one
ATTENTION = ("auto", *KERNELS)


def _chosen(name: str, query: Array, *, plain: bool) -> str:
    """The kernel for these queries [B, T, H, d]; `plain` where each sees all that is before it in its segment."""
    on, length, is_short = platform(), query.shape[1], query.dtype.itemsize == 2
    if one_of("attn_implementation", name, ATTENTION) == "auto":
        is_long = length >= LEAST_LENGTH
        name = "splash" if on == "tpu" and is_long else "flash" if on == "cuda" and is_short else "xla"
    if name != "xla" and on != PLATFORMS[name]:
        raise ConfigError(f"attn_implementation {name} is for {PLATFORMS[name]}, and this is a {on}; leave it out")
    if (name == "splash" and not plain) or (name == "flash" and length < BLOCK):
        return "xla"
    return name
