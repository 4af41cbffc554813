"""The losses of completions that are judged one by one, as functions of log-ratios; see `objectives.kto`."""

import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid
from jaxtyping import Bool, Float


def kl_estimate(
    logps: Float[Array, "*examples"], ref_logps: Float[Array, "*examples"], mask: Bool[Array, "*examples"]
) -> Float[Array, ""]:
    """How far the policy has moved from the reference, from completions of other prompts; never negative."""
    total = jnp.sum(jnp.where(mask, logps - ref_logps, 0.0))
    return jnp.maximum(total / jnp.maximum(jnp.sum(mask), 1), 0.0)


def kto_loss(
    logratios: Float[Array, "*examples"],
    kl: Float[Array, "*examples"],
    label: Float[Array, "*examples"],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "*examples"]:
    """w_D (1 - S(b(x - z))) where the label is 1, w_U (1 - S(b(z - x))) where it is 0; carries no gradient to z."""
    x = beta * (logratios - kl)
    return jnp.where(label > 0, desirable_weight * sigmoid(-x), undesirable_weight * sigmoid(x))


def apo_zero_unpaired(
    logratios: Float[Array, "*examples"],
    label: Float[Array, "*examples"],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "*examples"]:
    """APO-zero (D'Oosterlinck et al., 2024, arXiv:2408.06266, equation 7) without pairs."""
    zero = jnp.zeros_like(logratios)
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return kto_loss(logratios, zero, label, beta=beta, **weights)
