"""What is said of tokens, and the gradient of it, from logits that need not be there all at once.

With p = softmax(l), its entropy H and the target t:

    log p_t = l_t - log sum_j exp(l_j)        d log p_t / d l_j = [j = t] - p_j
    H = -sum_j p_j log p_j                    d H / d l_j = -p_j (log p_j + H)

Both need but a few sums over the vocabulary, which can be taken a part at a time (Milakov and Gimelshein, 2018, "Online
normalizer calculation for softmax", arXiv:1805.02867).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class TokenScores(NamedTuple):
    """What a model says of given tokens; 0 where the mask is 0.

    Attributes:
        logps: log-probability of each target, nats.
        entropy: of the whole distribution, nats; carries no gradient unless asked for.
        top: 1 where the target is the most probable token; carries no gradient.
        mean_logit: over the vocabulary; 0 unless asked for; carries no gradient.
        collision: log of the sum of the squared probabilities, nats; 0 unless asked for; carries no gradient.
    """

    logps: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    top: Float[Array, "B T"]
    mean_logit: Float[Array, "B T"]
    collision: Float[Array, "B T"]


class Tally(NamedTuple):
    """What the logits l of a token are like, in the part of the vocabulary that was seen.

    Attributes:
        peak: the largest.
        mass: sum of exp(l - peak).
        weighted: sum of exp(l - peak) l.
        chosen: l of the target; 0 where it was not seen.
        total: sum of l, if details are asked for.
        squares: sum of exp(l - peak)^2, likewise.
    """

    peak: Array
    mass: Array
    weighted: Array
    chosen: Array
    total: Array
    squares: Array

    @classmethod
    def of(cls, logits: Float[Array, "N V"], places: Int[Array, "N 1"], *, details: bool) -> "Tally":
        """Of logits that are seen at once.

        Args:
            logits: of a part of the vocabulary.
            places: where the target is in it; outside of it for one that is not there.
            details: whether `total` and `squares` are found; 0 otherwise.
        """
        peak = jnp.max(logits, axis=-1)
        shifted = jnp.exp(logits - peak[:, None])
        found = jnp.take_along_axis(logits, jnp.clip(places, 0, logits.shape[1] - 1), axis=1)
        chosen = jnp.where((places >= 0) & (places < logits.shape[1]), found, 0.0)[:, 0]
        total = squares = jnp.zeros_like(peak)
        if details:
            total, squares = jnp.sum(logits, axis=-1), jnp.sum(shifted * shifted, axis=-1)
        return cls(peak, jnp.sum(shifted, axis=-1), jnp.sum(shifted * logits, axis=-1), chosen, total, squares)

    @classmethod
    def nothing(cls, shape: tuple[int, ...]) -> "Tally":
        """Of no logits."""
        zeros = jnp.zeros(shape, jnp.float32)
        return cls(jnp.full_like(zeros, -jnp.inf), *[zeros] * (len(cls._fields) - 1))

    def joined(self, other: "Tally") -> "Tally":
        """Of both parts."""
        peak = jnp.maximum(self.peak, other.peak)
        mine, its = jnp.exp(self.peak - peak), jnp.exp(other.peak - peak)
        return Tally(
            peak,
            self.mass * mine + other.mass * its,
            self.weighted * mine + other.weighted * its,
            self.chosen + other.chosen,
            self.total + other.total,
            self.squares * mine**2 + other.squares * its**2,
        )

    @property
    def normalizer(self) -> Array:
        """log of the sum of exp(l)."""
        return self.peak + jnp.log(self.mass)

    @property
    def entropy(self) -> Array:
        """Of the softmax."""
        return self.normalizer - self.weighted / self.mass

    def scores(self, width: int, *, details: bool) -> TokenScores:
        """What it says, once the whole vocabulary of `width` tokens was seen; 0 where nothing was."""
        mean_logit = collision = jnp.zeros_like(self.peak)
        if details:
            mean_logit, collision = self.total / width, jnp.log(self.squares) - 2 * jnp.log(self.mass)
        top = (self.chosen >= self.peak).astype(jnp.float32)
        # In this order, which is the sampler's: the peak is large, and so is what the rounding of a sum with it loses.
        logps = self.chosen - self.peak - jnp.log(self.mass)
        said = TokenScores(logps, self.entropy, top, mean_logit, collision)
        return jax.tree.map(lambda x: jnp.where(self.mass > 0, x, 0.0), said)


def slopes(
    logits: Float[Array, "N V"],
    places: Int[Array, "N 1"],
    normalizer: Float[Array, "N 1"],
    entropy: Float[Array, "N 1"],
    of_logps: Float[Array, "N 1"],
    of_entropy: Float[Array, "N 1"] | None,
) -> Float[Array, "N V"]:
    """The gradient of logits of a part of the vocabulary, with respect to which a loss has these of scores.

    Args:
        logits: of the part.
        places: as of `Tally.of`.
        normalizer, entropy: of the whole vocabulary.
        of_logps, of_entropy: gradient of the loss; None where none flows through the entropy.
    """
    log_p = logits - normalizer
    p = jnp.exp(log_p)
    is_target = (places == jnp.arange(logits.shape[1])).astype(logits.dtype)
    through_logps = of_logps * (is_target - p)
    return through_logps if of_entropy is None else through_logps - of_entropy * p * (log_p + entropy)
