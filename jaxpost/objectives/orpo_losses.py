"""The odds of ORPO, as functions of log-probabilities; the source is that of `objectives.orpo`."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

HALF = -0.6931471805599453  # log(1/2), where the two ways to compute log(1 - p) are equally exact


def log_odds_ratio(chosen: Float[Array, "*pairs"], rejected: Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
    """log odds(chosen) - log odds(rejected) of mean log-probabilities, where odds(p) = p / (1 - p)."""
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def log1mexp(x: Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
    """log(1 - exp(x)) of x < 0, finite up to 0, and so is its gradient.

    Maechler, 2012, "Accurately Computing log(1 - exp(-|a|))", equation 7.
    """
    x = jnp.minimum(x, -jnp.finfo(x.dtype).eps)
    near = x > HALF
    # Each branch is given a value at which it is defined, so that the one not taken has a finite gradient.
    of_near, of_far = jnp.where(near, x, HALF), jnp.where(near, HALF, x)
    return jnp.where(near, jnp.log(-jnp.expm1(of_near)), jnp.log1p(-jnp.exp(of_far)))
