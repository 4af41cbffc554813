"""The maths of GRPO and its kin, on arrays: advantages of groups, and losses of tokens.

Tokens are [*shape]; what belongs to a sequence is broadcast to its tokens by the caller. Sources stand at each.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # their tokens' losses are those of PPO
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
EPSILON = 1e-4  # added to standard deviations
LEAST_LOG_WEIGHT, GREATEST_LOG_WEIGHT = -18.420680743952367, 20.0  # log 1e-8; bounds of VESPO's weights


def group_sums(values: Float[Array, "N"], groups: Int[Array, "N"]) -> Float[Array, "N"]:
    """For each element the sum over its group."""
    return jax.ops.segment_sum(values, groups, num_segments=len(values))[groups]


def group_mean(values: Float[Array, "N"], groups: Int[Array, "N"], known: Bool[Array, "N"]) -> Float[Array, "N"]:
    """For each element the mean over the known ones of its group; 0 where there are none."""
    count = group_sums(known.astype(values.dtype), groups)
    return group_sums(jnp.where(known, values, 0), groups) / jnp.maximum(count, 1)


def group_std(values: Float[Array, "N"], groups: Int[Array, "N"], known: Bool[Array, "N"]) -> Float[Array, "N"]:
    """Likewise the standard deviation of a sample (with n - 1); 0 where fewer than two are known."""
    count = group_sums(known.astype(values.dtype), groups)
    off = jnp.where(known, values - group_mean(values, groups, known), 0)
    return jnp.sqrt(group_sums(off * off, groups) / jnp.maximum(count - 1, 1))


def weighted_rewards(
    rewards: Float[Array, "N F"], weights: Float[Array, "F"]
) -> tuple[Float[Array, "N"], Bool[Array, "N"]]:
    """The weighted sum of what is known of each completion's rewards, and whether anything is; NaN is unknown."""
    known = ~jnp.isnan(rewards)
    return jnp.sum(jnp.where(known, rewards, 0) * weights, axis=1), jnp.any(known, axis=1)


def group_advantages(
    rewards: Float[Array, "N F"],
    groups: Int[Array, "N"],
    weights: Float[Array, "F"],
    *,
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
    present: Bool[Array, "N"] | None = None,
) -> Float[Array, "N"]:
    """How much better than its group each completion is; 0 where no reward is known.

    Shao et al., 2024, "DeepSeekMath", arXiv:2402.03300, section 4.1.2. With `normalize_then_sum` each reward is
    normalised for itself (GDPO: Liu et al., 2026, arXiv:2601.05242).

    Args:
        rewards: of F functions; NaN where one has nothing to say.
        groups: number of each completion's prompt, below N.
        weights: of the functions.
        scale: what differences are divided by: the standard deviation of the `group`, of the `batch`, or `none` (Liu et
            al., 2025, "Understanding R1-Zero-Like Training", arXiv:2503.20783).
        aggregation: `sum_then_normalize` or `normalize_then_sum`.
        present: where there is a completion at all.
    """
    rewards = rewards if present is None else jnp.where(present[:, None], rewards, jnp.nan)
    summed, known = weighted_rewards(rewards, weights)
    if aggregation == "normalize_then_sum":
        columns = [_normalised(rewards[:, i], groups, ~jnp.isnan(rewards[:, i])) for i in range(rewards.shape[1])]
        summed = jnp.stack(columns, axis=1) @ weights
        return standardised(summed, known)
    advantages = summed - group_mean(summed, groups, known)
    if scale != "none":
        advantages /= group_std(summed, groups if scale == "group" else jnp.zeros_like(groups), known) + EPSILON
    return jnp.where(known, advantages, 0.0)


def _normalised(values: Array, groups: Array, known: Array) -> Array:
    values = jnp.where(known, values, 0)
    scaled = (values - group_mean(values, groups, known)) / (group_std(values, groups, known) + EPSILON)
    return jnp.where(known, scaled, 0.0)


def leave_one_out_advantages(
    rewards: Float[Array, "N"], groups: Int[Array, "N"], known: Bool[Array, "N"], *, normalize: bool = False
) -> Float[Array, "N"]:
    """How much better each completion is than the mean of the others of its group; 0 where no reward is known.

    Ahmadian et al., 2024, "Back to Basics", arXiv:2402.14740, equation 8. One that is alone has nothing to compare
    with, and an advantage of 0.
    """
    count = group_sums(known.astype(rewards.dtype), groups)
    total = group_sums(jnp.where(known, rewards, 0), groups)
    has_others = known & (count > 1)
    advantages = jnp.where(has_others, rewards - (total - rewards) / jnp.maximum(count - 1, 1), 0.0)
    return standardised(advantages, known) if normalize else advantages


def standardised(values: Float[Array, "N"], known: Bool[Array, "N"]) -> Float[Array, "N"]:
    """Values less their mean, in units of their deviation; 0 where they are not known."""
    return _normalised(values, jnp.zeros(len(values), jnp.int32), known)


def clipped_loss(
    ratio: Array, advantages: Array, *, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> Array:
    """-min(min(ratio, delta) A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A).

    Schulman et al., 2017, "Proximal Policy Optimization Algorithms", arXiv:1707.06347, equation 7; `delta` bounds what
    the clip leaves unbounded (two-sided clipping, INTELLECT-2, arXiv:2505.07291).
    """
    clipped = jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    bounded = ratio if delta is None else jnp.minimum(ratio, delta)
    return -jnp.minimum(bounded * advantages, clipped * advantages)


def cispo_loss(ratio: Array, logps: Array, advantages: Array, *, epsilon_high: float) -> Array:
    """-min(ratio, epsilon_high) A log pi, with no gradient through the weight (MiniMax-M1, arXiv:2506.13585)."""
    return -lax.stop_gradient(jnp.minimum(ratio, epsilon_high)) * advantages * logps


def sapo_loss(ratio: Array, advantages: Array, *, temperature_pos: float, temperature_neg: float) -> Array:
    """-(4 / tau) sigma(tau (ratio - 1)) A: a soft gate in the clip's place (SAPO, arXiv:2511.20347)."""
    tau = jnp.where(advantages > 0, temperature_pos, temperature_neg)
    return -jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def vespo_weight(
    log_weight: Array, advantages: Array, *, k_pos: float, lambda_pos: float, k_neg: float, lambda_neg: float
) -> Array:
    """phi = e^lambda W^k e^(-lambda W) of a sequence's importance weight W; no gradient (VESPO, arXiv:2602.10693)."""
    log_weight = jnp.clip(log_weight, LEAST_LOG_WEIGHT, GREATEST_LOG_WEIGHT)
    k, rate = jnp.where(advantages >= 0, k_pos, k_neg), jnp.where(advantages >= 0, lambda_pos, lambda_neg)
    rate = jnp.maximum(rate, 1e-4)
    return lax.stop_gradient(jnp.exp(rate + k * log_weight - rate * jnp.exp(log_weight)))


def truncated_weight(log_ratio: Float[Array, "*N"], cap: float) -> Float[Array, "*N"]:
    """Importance weight of a sample that another distribution has drawn, at most `cap`.

    Ionides, 2008, "Truncated Importance Sampling".

    Args:
        log_ratio: log of the probability now, less its log when it was drawn.
        cap: greatest weight; it bounds the variance, and the bias is in what is cut.
    """
    return jnp.minimum(jnp.exp(log_ratio), cap)


def k3(logps: Array, ref_logps: Array) -> Array:
    """KL divergence from the reference, estimated from the tokens of the policy: r - log r - 1 with r = ref / pi.

    Schulman, 2020, "Approximating KL Divergence"; Shao et al., 2024, equation 4.
    """
    return jnp.exp(ref_logps - logps) - (ref_logps - logps) - 1


def quantile(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"], share: float) -> Float[Array, ""]:
    """The quantile of the values where the mask is True, between two of them by interpolation; 0 where it never is."""
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf).reshape(-1))
    place = share * jnp.maximum(jnp.sum(mask) - 1, 0)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(jnp.sum(mask) - 1, 0))
    found = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    return jnp.where(jnp.any(mask), found, 0.0)
