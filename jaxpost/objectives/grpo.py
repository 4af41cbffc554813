"""Group relative policy optimisation: a completion is as good as it is better than others of the same prompt.

    A_i = (r_i - mean(r)) / std(r),  rho_t = pi(y_t|x,y_<t) / old(y_t|x,y_<t)
    L = -mean_t [ min(rho_t A_i, clip(rho_t, 1 - eps, 1 + eps') A_i) - beta (ref/pi - log ref/pi - 1) ]

Shao et al., 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
arXiv:2402.03300, equation 3. What the mean runs over, and what stands in the clip's place, is `loss_type`; by default
it is DAPO's (Yu et al., 2025, arXiv:2503.14476): all tokens of a step alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxpost.errors import ConfigError
from jaxpost.metrics import Mean, Metric, masked_mean
from jaxpost.objectives.base import Batch, Model
from jaxpost.objectives.grpo_losses import (
    CLIPPED,
    LOSS_TYPES,
    cispo_loss,
    clipped_loss,
    group_advantages,
    k3,
    quantile,
    sapo_loss,
    truncated_weight,
    vespo_weight,
)
from jaxpost.objectives.logps import next_tokens, score_batch
from jaxpost.objectives.online import (
    ClippedBase,
    clip_metrics,
    importance_metrics,
    moved_since_sampling,
    sampling_difference,
)
from jaxpost.objectives.sequences import exists, mean_per_example, per_example, per_token
from jaxpost.options import check_choices, option

PER_TOKEN = ("bnpo", "dapo", "cispo", "vespo")  # the mean is over all tokens of a step


@dataclass(frozen=True, kw_only=True)
class GRPO(ClippedBase):
    """The objective; rows are completions of the policy, see `objectives.online`."""

    remembers: ClassVar[tuple[str, ...]] = ("entropy_coef_change", "entropy_is_low")

    beta: float = option(0.0, "Coefficient of the KL divergence from the reference; 0 for no reference.")
    loss_type: str = option("dapo", f"Loss: {', '.join(LOSS_TYPES)}.", choices=LOSS_TYPES)
    importance_sampling_level: str = option(
        "token", "Ratios are of each token, or of the sequence (GSPO).", choices=("token", "sequence")
    )
    delta: float | None = option(None, "Greatest ratio that counts at all (two-sided clipping); null for no bound.")
    scale_rewards: str = option(
        "group",
        "Advantages are divided by the deviation in the group, batch, or none.",
        choices=("group", "batch", "none"),
    )
    multi_objective_aggregation: str = option(
        "sum_then_normalize",
        "Order of summing reward functions: sum_then_normalize or normalize_then_sum (GDPO).",
        choices=("sum_then_normalize", "normalize_then_sum"),
    )
    top_entropy_quantile: float = option(1.0, "Learn only from this share of the tokens, the most uncertain ones.")
    entropy_coef: float = option(0.0, "Coefficient of the mean entropy of tokens, which is rewarded.")
    use_adaptive_entropy: bool = option(False, "Move entropy_coef to keep the entropy at entropy_target.")
    entropy_target: float = option(0.2, "Entropy below which it is rewarded, nats a token.")
    entropy_coef_delta: float = option(0.005, "How far entropy_coef moves in a step.")
    entropy_coef_min: float = option(0.0, "Its least value.")
    entropy_coef_max: float = option(1.0, "Its greatest value.")
    off_policy_mask_threshold: float | None = option(
        None, "Leave out bad completions from which the policy has moved further than this KL; null for none."
    )
    use_bias_correction_kl: bool = option(
        True, "Weight the KL divergence by the ratio, which makes its gradient unbiased (DeepSeek-V3.2)."
    )
    sapo_temperature_pos: float = option(1.0, "sapo: temperature of the gate where the advantage is positive.")
    sapo_temperature_neg: float = option(1.05, "sapo: where it is not.")
    vespo_k_pos: float = option(2.0, "vespo: power of the weight where the advantage is not negative.")
    vespo_lambda_pos: float = option(3.0, "vespo: its rate of decay there.")
    vespo_k_neg: float = option(3.0, "vespo: power where the advantage is negative.")
    vespo_lambda_neg: float = option(2.0, "vespo: rate there.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if self.beta < 0:
            raise ConfigError(f"beta is {self.beta}; it must not be negative")
        if not 0 < self.top_entropy_quantile <= 1:
            raise ConfigError(f"top_entropy_quantile is {self.top_entropy_quantile}; it must be above 0, at most 1")
        if self.delta is not None and self.delta <= 1 + self.high:
            raise ConfigError(f"delta is {self.delta}; it must be above 1 + epsilon_high, {1 + self.high}")
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ConfigError("cispo: epsilon_high is the greatest weight of a token; give it, its authors use 5.0")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")

    @property
    def needs_reference(self) -> bool:
        return self.beta != 0

    @property
    def rewards_entropy(self) -> bool:
        """Whether the loss has an entropy term."""
        return self.entropy_coef != 0 or self.use_adaptive_entropy

    @property
    def needs_equal_rewards(self) -> bool:
        """Their advantages are 0, and nothing but the advantages gives a gradient unless one of these is used."""
        others = self.needs_reference or self.rewards_entropy or self.router_aux_loss_coef
        return bool(others) or self.top_entropy_quantile < 1 or self.multi_objective_aggregation != "sum_then_normalize"

    def appraise(
        self, policy: Model, reference: Model | None, batch: Batch, *, reused: bool, stale: bool = False
    ) -> Batch:
        batch, shape = self.trained(batch), batch["groups"].shape
        advantages = group_advantages(
            batch["rewards"].reshape(-1, batch["rewards"].shape[-1]),
            batch["groups"].reshape(-1),
            self.weights(batch),
            scale=self.scale_rewards,
            aggregation=self.multi_objective_aggregation,
            present=exists(batch).reshape(-1),
        )
        batch = {**batch, "advantages": advantages.reshape(shape)}
        if stale and self.loss_type == "vespo":  # whose weight is of sequences, from what they were sampled with
            batch["old_logps"] = batch["sampled_logps"]
        elif reused or stale:
            batch["old_logps"] = self.token_logps(policy, batch)
        if stale and self.loss_type != "vespo":
            batch["importance"] = truncated_weight(moved_since_sampling(batch), self.importance_sampling_cap)
        if reference is not None:
            batch["ref_logps"] = self.token_logps(reference, batch)
        return batch

    def annotate(self, policy: Model, reference: Model | None, batch: Batch) -> Batch:
        mask, rows = next_tokens(batch)[1], len(batch["tokens"])
        scored = mask
        entropy = None
        if self.top_entropy_quantile < 1 or self.use_adaptive_entropy:
            entropy = lax.stop_gradient(score_batch(policy, batch, temperature=self.temperature)[0].entropy)
        if self.top_entropy_quantile < 1:
            assert entropy is not None
            floor = quantile(entropy, mask, 1 - self.top_entropy_quantile)
            scored = mask & (entropy >= floor)
            batch = {**batch, "uncertain": scored.astype(jnp.float32)}
        if not self.rewards_entropy:
            return batch
        count = jnp.sum(mask) if self.loss_type in PER_TOKEN else jnp.sum(batch["examples"])
        coef = self.entropy_coef + batch["entropy_coef_change"][0]
        applied = coef
        if self.use_adaptive_entropy:
            assert entropy is not None
            applied = jnp.where(batch["entropy_is_low"][0] > 0, coef, 0.0)
            is_low = masked_mean(entropy, scored).value() <= self.entropy_target
            moved = coef + jnp.where(is_low, self.entropy_coef_delta, -self.entropy_coef_delta)
            coef = jnp.where(
                is_low, jnp.minimum(moved, self.entropy_coef_max), jnp.maximum(moved, self.entropy_coef_min)
            )
            batch["entropy_coef_change"] = jnp.full(rows, coef - self.entropy_coef)
            batch["entropy_is_low"] = jnp.full(rows, is_low.astype(jnp.float32))
        # What a sum of entropies is multiplied with for their mean to stand beside the mean of the losses.
        share = applied * count / jnp.maximum(jnp.sum(scored), 1)
        return {**batch, "entropy_share": jnp.full(rows, share), "entropy_coef_now": jnp.full(rows, coef)}

    def loss(self, model: Model, batch: Batch) -> tuple[Mean, Mapping[str, Metric]]:
        options = {"temperature": self.temperature, "entropy_gradient": self.rewards_entropy}
        scores, mask, balance = score_batch(model, batch, **options)
        logps, advantages = scores.logps, per_token(batch["advantages"], batch)
        old = batch["old_logps"] if "old_logps" in batch else lax.stop_gradient(logps)
        per_sequence = self.importance_sampling_level == "sequence"
        log_ratio = logps - old
        ratio = jnp.exp(per_token(mean_per_example(log_ratio, mask, batch), batch) if per_sequence else log_ratio)
        losses, metrics = self._losses(logps, log_ratio, ratio, advantages, mask, batch)
        if self.off_policy_mask_threshold is not None:
            sampled = batch.get("sampled_logps", old)
            moved = mean_per_example(lax.stop_gradient(sampled - logps), mask, batch)
            kept = (batch["advantages"] >= 0) | (moved <= self.off_policy_mask_threshold)
            losses = losses * per_token(kept.astype(jnp.float32), batch)
        if "importance" in batch:
            losses = losses * batch["importance"]
            metrics |= importance_metrics(batch["importance"], mask)
        scored = mask
        if "uncertain" in batch:
            scored = mask & (batch["uncertain"] > 0)
            losses = losses * batch["uncertain"]
        if self.beta:
            kl = k3(logps, batch["ref_logps"])
            kl = kl * ratio if self.use_bias_correction_kl else kl
            losses = losses + self.beta * kl
            metrics["kl"] = masked_mean(kl, mask)
        loss = self._reduced(losses, mask, batch)
        if self.rewards_entropy:
            coef = batch["entropy_coef_now"]
            metrics |= {"policy_loss": loss, "entropy_coef": masked_mean(coef, jnp.ones_like(coef, bool))}
            bonus = jnp.sum(jnp.where(scored, scores.entropy, 0.0) * batch["entropy_share"][:, None])
            loss = Mean(loss.total - bonus, loss.count)
        loss, routing = self.with_balance(loss, balance)
        metrics["entropy"] = masked_mean(scores.entropy, mask)
        return loss, metrics | sampling_difference(logps, batch) | routing

    def _losses(
        self,
        logps: Float[Array, "B T"],
        log_ratio: Float[Array, "B T"],
        ratio: Float[Array, "B T"],
        advantages: Float[Array, "B T"],
        mask: Bool[Array, "B T"],
        batch: Batch,
    ) -> tuple[Float[Array, "B T"], dict[str, Metric]]:
        """What each token adds to the loss, and metrics of that."""
        if self.loss_type in CLIPPED:
            bounds = {"epsilon_low": self.epsilon, "epsilon_high": self.high}
            losses = clipped_loss(ratio, advantages, **bounds, delta=self.delta)
            bounded = ratio if self.delta is None else jnp.minimum(ratio, self.delta)
            options = {"low": self.epsilon, "high": self.high}
            if self.importance_sampling_level == "token":
                return losses, clip_metrics(bounded, advantages, mask, batch, **options)
            of_sequences = mean_per_example(bounded, mask, batch)
            return losses, clip_metrics(of_sequences, batch["advantages"], None, batch, **options)
        if self.loss_type == "cispo":
            clipped = ((ratio > self.high) & (advantages > 0)).astype(jnp.float32)
            losses = cispo_loss(ratio, logps, advantages, epsilon_high=self.high)
            return losses, {"cispo_clip_ratio": masked_mean(clipped, mask)}
        if self.loss_type == "sapo":
            temperatures = {"temperature_pos": self.sapo_temperature_pos, "temperature_neg": self.sapo_temperature_neg}
            return sapo_loss(ratio, advantages, **temperatures), {}
        log_weight = per_example(jnp.where(mask, jnp.clip(log_ratio, -20.0, 20.0), 0.0), batch)
        phi = vespo_weight(
            log_weight,
            batch["advantages"],
            k_pos=self.vespo_k_pos,
            lambda_pos=self.vespo_lambda_pos,
            k_neg=self.vespo_k_neg,
            lambda_neg=self.vespo_lambda_neg,
        )
        losses = -per_token(phi, batch) * advantages * logps
        return losses, {"vespo/phi_seq_mean": masked_mean(phi, exists(batch))}

    def _reduced(self, losses: Float[Array, "B T"], mask: Bool[Array, "B T"], batch: Batch) -> Mean:
        """The mean that the loss type takes."""
        if self.loss_type in PER_TOKEN:
            return Mean(jnp.sum(jnp.where(mask, losses, 0.0)), jnp.sum(batch["num_trained"]))
        if self.loss_type in ("grpo", "sapo"):
            return masked_mean(mean_per_example(losses, mask, batch), exists(batch))
        sums = masked_mean(per_example(jnp.where(mask, losses, 0.0), batch), exists(batch))
        return sums if self.loss_type == "luspo" else Mean(sums.total / self.max_completion_length, sums.count)
