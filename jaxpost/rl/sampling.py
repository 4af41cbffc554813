"""Choosing the next token: greedy, or from the softmax at a temperature, of all tokens or of the likely ones.

Every knob is traced: changing it does not recompile. Filters apply in the order of `transformers`: repetition penalty,
temperature, top-k, top-p, min-p. They find their thresholds by bisection, so nothing is sorted.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxpost.errors import ConfigError
from jaxpost.options import Group, option

CHUNKS = 256  # the vocabulary is searched in about so many parts


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn; names and defaults of transformers and TRL."""

    help_group = Group.COMPLETIONS

    temperature: float = option(1.0, "Softmax temperature; 0 is greedy.")
    top_k: int = option(0, "Draw from so many of the most probable tokens; 0 for all.")
    top_p: float = option(1.0, "Draw from the fewest tokens that are together this probable; 1 for all.")
    min_p: float | None = option(None, "Leave out tokens below this share of the greatest probability; null for none.")
    repetition_penalty: float = option(1.0, "Above 1, tokens that were there already are less probable.")

    def __post_init__(self) -> None:
        for name, value, fits, wanted in (
            ("temperature", self.temperature, self.temperature >= 0, "at least 0, which is greedy"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0, which is all"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1, or null"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
        ):
            if not fits:
                raise ConfigError(f"{name} is {value}; it must be {wanted}")

    def knobs(self) -> "Sampling":
        """The same as numbers that a compiled program takes."""
        rest = map(float, (self.top_p, self.min_p or 0, self.repetition_penalty))
        return Sampling(float(self.temperature), self.top_k, *rest)


class Sampling(NamedTuple):
    """The knobs as arguments of a compiled program; see SamplingConfig. `min_p` is 0 for none."""

    temperature: Float[Array, ""] | float = 1.0
    top_k: Int[Array, ""] | int = 0
    top_p: Float[Array, ""] | float = 1.0
    min_p: Float[Array, ""] | float = 0.0
    repetition_penalty: Float[Array, ""] | float = 1.0


def sample(
    logits: Float[Array, "B V"], uniform: Float[Array, "B"], seen: Bool[Array, "B V"] | None, sampling: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draw one token a row.

    Args:
        logits: float32.
        uniform: from [0, 1), what each row's token is drawn with.
        seen: tokens that the row has had, for the repetition penalty; None for none.
        sampling: the knobs.

    Returns:
        Token ids, and their log-probabilities (nats) under the distribution they were drawn from; greedy tokens are
        scored at temperature 1.
    """
    logits = likely(logits, seen, sampling)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - peak)
    drawn, mass = _draw(weights, uniform)
    # XLA on CPU takes as long over it as over the rest of the sampler, so it is looked for where it is wanted only.
    greedy = lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32)  # noqa: E731
    tokens = lax.cond(sampling.temperature <= 0, greedy, lambda: drawn.astype(jnp.int32))
    chosen = jnp.take_along_axis(logits - peak, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jnp.log(mass)


def likely(logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, sampling: Sampling) -> Float[Array, "B V"]:
    """Logits of the distribution that tokens are drawn from; -inf for those that never are.

    Keskar et al., 2019, arXiv:1909.05858 (repetition penalty); Fan et al., 2018, arXiv:1805.04833 (top-k); Holtzman et
    al., 2019, arXiv:1904.09751 (top-p); Nguyen et al., 2024, arXiv:2407.01082 (min-p).
    """
    temperature, top_k, top_p, min_p, penalty = sampling
    if seen is not None:
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits / jnp.where(temperature <= 0, 1.0, temperature)

    def filtered(logits: Array) -> Array:
        ones = jnp.ones_like(logits)
        logits = jnp.where(top_k > 0, _heaviest(logits, ones, jnp.float32(top_k)), logits)
        logits = jnp.where(top_p < 1, _heaviest(logits, jax.nn.softmax(logits, axis=-1), jnp.float32(top_p)), logits)
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
        return jnp.where(logits >= least, logits, -jnp.inf)

    is_filtered = (jnp.asarray(top_k) > 0) | (top_p < 1) | (min_p > 0)
    return lax.cond(is_filtered, filtered, lambda logits: logits, logits)


def _heaviest(logits: Float[Array, "B V"], weights: Float[Array, "B V"], target: Array) -> Float[Array, "B V"]:
    """The greatest logits whose weights make `target` together, the others -inf; all where there are too few."""
    bits = lax.bitcast_convert_type(logits, jnp.int32)
    keys = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered as the numbers are

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # keys from `low` up are enough, those from `high` up are not
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = jnp.sum(jnp.where(keys >= middle[:, None], weights, 0.0), axis=-1) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    rows = logits.shape[0]
    limits = jnp.iinfo(jnp.int32)
    start = (jnp.full(rows, limits.min), jnp.full(rows, limits.max))
    low, _ = lax.fori_loop(0, 32, halve, start)
    return jnp.where(keys >= low[:, None], logits, -jnp.inf)


def _draw(weights: Float[Array, "B V"], uniform: Float[Array, "B"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """A place for each row, with the probability of its weight; and the sum of the weights.

    Searched first among the sums of chunks and then in one chunk: running sums of a whole vocabulary cost more than the
    rest of the sampler.
    """
    rows, width = weights.shape
    size = -(-width // CHUNKS)
    chunks = jnp.pad(weights, [(0, 0), (0, -width % size)]).reshape(rows, -1, size)
    sums = jnp.sum(chunks, axis=2)
    mass = jnp.sum(sums, axis=1)
    goal = uniform * mass
    chunk, before = _first_above(sums, goal)
    within = jnp.take_along_axis(chunks, chunk[:, None, None], axis=1)[:, 0]
    return chunk * size + _first_above(within, goal - before)[0], mass


def _first_above(weights: Float[Array, "B N"], goal: Float[Array, "B"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The first weight with which the running sum exceeds the goal, and the sum before it.

    It is never one of 0; where rounding lets none exceed the goal, it is the greatest.
    """
    ends = jnp.cumsum(weights, axis=1)
    fits = (ends > goal[:, None]) & (weights > 0)
    place = jnp.where(jnp.any(fits, axis=1), jnp.argmax(fits, axis=1), jnp.argmax(weights, axis=1))
    before = jnp.take_along_axis(ends - weights, place[:, None], axis=1)[:, 0]
    return place, before
