"""The loss of binary classifier optimisation, as a function of rewards; see `objectives.bco`."""

import jax.numpy as jnp
from jax import Array
from jax.nn import log_sigmoid
from jaxtyping import Float


def bco_loss(
    rewards: Float[Array, "*examples"],
    shift: Float[Array, "*#examples"],
    label: Float[Array, "*examples"],
    weight: Float[Array, "*#examples"] | float = 1.0,
) -> Float[Array, "*examples"]:
    """-log S(x - d) where the label is 1, -w log S(-(x - d)) where it is 0; the shift d is a constant.

    The weight w is 1 where the label is.
    """
    x = rewards - shift
    return -weight * log_sigmoid(jnp.where(label > 0, x, -x))
