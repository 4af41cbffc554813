"""The losses of a reward model, as functions of rewards; sources are those of `objectives.reward`."""

from jax import Array
from jax.nn import log_sigmoid
from jaxtyping import Float


def bradley_terry(
    chosen: Float[Array, "*pairs"], rejected: Float[Array, "*pairs"], margin: Float[Array, "*pairs"] | float = 0.0
) -> Float[Array, "*pairs"]:
    """-log of the probability that the chosen wins by more than the margin."""
    return -log_sigmoid(chosen - rejected - margin)


def centring(chosen: Float[Array, "*pairs"], rejected: Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
    """The square of a pair's sum, which is least where rewards are centred at 0."""
    return (chosen + rejected) ** 2
