"""Who sees whom: the segments of rows, where their documents branch, and which tiles of scores that leaves."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int


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


def needed_tiles(views: Views, window: Array | None, size: int) -> Bool[Array, "B tiles tiles"]:
    """Which tiles of keys a tile of queries needs: those that may hold tokens of its segments, or of their trunks."""
    tiled = Views(*(x.reshape(len(x), -1, size) for x in views))
    begins = tiled.begins if window is None else tiled.begins + jnp.maximum(tiled.positions - window + 1, 0)
    lows, highs = _range(tiled.segments, tiled.segments > 0)
    trunk_lows, trunk_highs = _range(tiled.trunks, tiled.starts > 0)
    shared = (lows[:, :, None] <= highs[:, None]) & (highs[:, :, None] >= lows[:, None])
    shared |= (trunk_lows[:, :, None] <= highs[:, None]) & (trunk_highs[:, :, None] >= lows[:, None])
    order = jnp.arange(tiled.segments.shape[1])
    within = (order + 1) * size > jnp.min(begins, axis=2)[:, :, None]
    return (shared & within & (order < order[:, None])) | (order == order[:, None])


def _range(values: Int[Array, "B tiles size"], mask: Array) -> tuple[Int[Array, "B tiles"], Int[Array, "B tiles"]]:
    """Least and greatest value of each tile where the mask is True; an empty range where it never is."""
    limit = jnp.iinfo(values.dtype).max
    return jnp.min(jnp.where(mask, values, limit), axis=2), jnp.max(jnp.where(mask, values, -limit), axis=2)
