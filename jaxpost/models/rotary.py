"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) and the ways it was stretched to longer texts."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jaxpost.models.config import Rotary

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


class Angles(NamedTuple):
    """Cosine and sine of every token's angles, for each of the model's rotary embeddings."""

    cos: Float[Array, "kinds rows half"]
    sin: Float[Array, "kinds rows half"]


def rotary_angles(
    rotaries: Sequence[Rotary], positions: Int[Array, "rows"], lengths: Int[Array, "rows"] | int
) -> Angles:
    """Angles of tokens at `positions` of texts of `lengths` tokens; once per forward pass, for all layers."""
    tables = [_table(rotary, positions, lengths) for rotary in rotaries]
    return Angles(*(jnp.stack(part) for part in zip(*tables, strict=True)))


def apply_rotary(
    x: Float[Array, "rows heads d"], cos: Float[Array, "rows half"], sin: Float[Array, "rows half"]
) -> Float[Array, "rows heads d"]:
    """Turn the pairs (x[i], x[i + half]) by their angles, as HF does; dimensions from 2 half on stay."""
    cos, sin = cos[:, None].astype(x.dtype), sin[:, None].astype(x.dtype)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def text_lengths(positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Tokens of the document that each token belongs to; documents stand one after the other in a row."""
    places = jnp.arange(positions.shape[1])
    last = (segments != jnp.roll(segments, -1, axis=1)) | (places == places[-1])
    ends = jax.lax.cummin(jnp.where(last, places, places[-1]), axis=1, reverse=True)
    return jnp.take_along_axis(positions, ends, axis=1) + 1


def _table(rotary: Rotary, positions: Array, lengths: Array | int) -> tuple[Array, Array]:
    frequencies = _FREQUENCIES[rotary.kind](rotary, jnp.broadcast_to(lengths, positions.shape)[:, None])
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return jnp.cos(angles) * rotary.attention_factor, jnp.sin(angles) * rotary.attention_factor


def _exponents(rotary: Rotary) -> Float[np.ndarray, "half"]:
    return np.arange(0, rotary.dim, 2, dtype=np.float32) / np.float32(rotary.dim)


def _default(rotary: Rotary, lengths: Array) -> Float[np.ndarray, "half"]:
    """Radians per position of each pair, float32."""
    return (1.0 / np.float32(rotary.theta) ** _exponents(rotary)).astype(np.float32)


def _none(rotary: Rotary, lengths: Array) -> Float[np.ndarray, "half"]:
    return np.zeros(rotary.dim // 2, np.float32)


def _linear(rotary: Rotary, lengths: Array) -> Float[np.ndarray, "half"]:
    """Positions divided by `factor` (Chen et al., 2023, arXiv:2306.15595)."""
    return _default(rotary, lengths) / np.float32(rotary.factor)


def _dynamic(rotary: Rotary, lengths: Array) -> Float[Array, "rows half"]:
    """A base that grows with the text once that is longer than in training ("dynamic NTK"; HF's formula)."""
    stretch = rotary.factor * jnp.maximum(lengths, rotary.original_max_positions) / rotary.original_max_positions
    theta = rotary.theta * (stretch - (rotary.factor - 1)) ** (rotary.dim / (rotary.dim - 2))
    return 1.0 / theta ** _exponents(rotary)


def _llama3(rotary: Rotary, lengths: Array) -> Float[np.ndarray, "half"]:
    """Low frequencies divided by `factor`, high ones kept, a smooth step between them.

    Grattafiori et al., 2024, "The Llama 3 Herd of Models", arXiv:2407.21783; the rule is in their released code.
    """
    frequencies = _default(rotary, lengths)
    turns = rotary.original_max_positions * frequencies / (2 * np.pi)
    share = (turns - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
    share = np.clip(share, 0.0, 1.0)
    return (frequencies * (share + (1 - share) / rotary.factor)).astype(np.float32)


def _yarn(rotary: Rotary, lengths: Array) -> Float[np.ndarray, "half"]:
    """As llama3, with the step linear in the dimension (Peng et al., 2023, arXiv:2309.00071, section 3.2)."""
    low, high = (
        rotary.dim * math.log(rotary.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))
        for turns in (rotary.beta_fast, rotary.beta_slow)
    )
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    ramp = (np.arange(rotary.dim // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    stretched = np.clip(ramp, 0.0, 1.0)
    frequencies = _default(rotary, lengths)
    return (frequencies * (1 - stretched) + frequencies / rotary.factor * stretched).astype(np.float32)


def _longrope(rotary: Rotary, lengths: Array) -> Float[Array, "rows half"]:
    """A divisor a pair, one set for short texts and one for long (Ding et al., 2024, arXiv:2402.13753)."""
    short, long = (np.asarray(factors, np.float32) for factors in (rotary.short_factors, rotary.long_factors))
    frequencies = _default(rotary, lengths)
    return jnp.where(lengths > rotary.original_max_positions, frequencies / long, frequencies / short)


_FREQUENCIES = {
    "default": _default,
    "none": _none,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
