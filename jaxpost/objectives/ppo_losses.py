"""The maths of PPO, on arrays: advantages of tokens, whitening, KL estimates and their controller, losses of tokens.

States stand at the positions that predict a token. Sources stand at each.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxpost.objectives.grpo_losses import k3

KL_ESTIMATORS = ("k1", "k3")
VARIANCE_EPSILON = 1e-8  # added to variances, as TRL does
GREATEST_ERROR = 0.2  # of the KL divergence, relative, that the controller of its coefficient reacts to


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    states: Bool[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantages and returns of every state; 0 elsewhere.

        delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  R_t = A_t + V_t

    Nothing follows the last state of a segment: those of one completion stand next to each other, and several
    completions may stand in a row. Schulman et al., 2015, "High-Dimensional Continuous Control Using Generalized
    Advantage Estimation", arXiv:1506.02438, equation 16.

    Args:
        rewards: for what was done in each state.
        values: of the states.
        states: where there is one.
        segments: which completion a position belongs to.
        gamma: discount of what comes later.
        lam: share of what is observed over what the values say; 1 for the whole of it.
    """
    values, rewards = jnp.where(states, values, 0), jnp.where(states, rewards, 0)
    last = jnp.arange(states.shape[1]) == states.shape[1] - 1
    goes_on = states & jnp.roll(states, -1, axis=1) & (segments == jnp.roll(segments, -1, axis=1)) & ~last
    following = jnp.where(goes_on, jnp.roll(values, -1, axis=1), 0)
    deltas = rewards + gamma * following - values

    def back(later: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, goes_on = at
        advantage = delta + gamma * lam * jnp.where(goes_on, later, 0)
        return advantage, advantage

    _, advantages = lax.scan(back, jnp.zeros_like(deltas[:, 0]), (deltas.T, goes_on.T), reverse=True)
    advantages = advantages.T
    return advantages, advantages + values


def whitened(
    values: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *, shift_mean: bool = True
) -> Float[Array, "*shape"]:
    """Values in units of their deviation (n - 1), less their mean if that is shifted; 0 where the mask is False."""
    count = jnp.sum(mask)
    mean = jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(count, 1)
    off = jnp.where(mask, values - mean, 0)
    variance = jnp.sum(off * off) / jnp.maximum(count - 1, 1)
    scaled = off * lax.rsqrt(variance + VARIANCE_EPSILON)
    return scaled if shift_mean else jnp.where(mask, scaled + mean, 0)


def kl_estimate(logps: Array, ref_logps: Array, estimator: str) -> Array:
    """KL divergence from the reference, estimated from a token of the policy: log pi - log ref, or `k3`.

    Schulman, 2020, "Approximating KL Divergence".
    """
    return logps - ref_logps if estimator == "k1" else k3(logps, ref_logps)


def controlled(
    log_factor: Float[Array, ""],
    kl: Float[Array, ""],
    num_completions: Float[Array, ""],
    *,
    target: float,
    horizon: float,
) -> Float[Array, ""]:
    """Log of what the KL coefficient has been multiplied with, after a generation with this divergence.

    The coefficient grows while the divergence is above its target and shrinks below. Ziegler et al., 2019, "Fine-Tuning
    Language Models from Human Preferences", arXiv:1909.08593, section 2.2, whose K is completions over horizon.
    """
    error = jnp.clip(kl / target - 1, -GREATEST_ERROR, GREATEST_ERROR)
    return log_factor + jnp.log1p(error * num_completions / horizon)


def value_losses(values: Array, old_values: Array, returns: Array, *, clip: float) -> tuple[Array, Array]:
    """(V - R)^2, and the same where V is kept within `clip` of what it was; the loss of a state is half the greater.

    As in OpenAI's baselines; Engstrom et al., 2020, "Implementation Matters in Deep Policy Gradients",
    arXiv:2005.12729, section 3.
    """
    kept = jnp.clip(values, old_values - clip, old_values + clip)
    return jnp.square(values - returns), jnp.square(kept - returns)
