"""REINFORCE leave-one-out: a completion is as good as it is better than the mean of the others of its prompt.

    R_i = r_i - beta sum_t log old(y_t)/ref(y_t),  A_i = R_i - mean_{j != i} R_j
    L = -mean_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps') A_i),  rho_i = pi(y_i|x) / old(y_i|x)

Ahmadian et al., 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
LLMs", arXiv:2402.14740, equations 7 and 8. With `baseline` `batch` it is REINFORCE++ (Hu et al., 2025,
arXiv:2501.03262): compared with the mean of all completions, in units of their deviation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from jaxpost.errors import ConfigError
from jaxpost.metrics import Mean, Metric, masked_mean
from jaxpost.objectives.base import Batch, Model
from jaxpost.objectives.grpo_losses import (
    clipped_loss,
    leave_one_out_advantages,
    standardised,
    truncated_weight,
    weighted_rewards,
)
from jaxpost.objectives.logps import next_tokens, score_batch
from jaxpost.objectives.online import (
    ClippedBase,
    check_bounds,
    clip_metrics,
    importance_metrics,
    moved_since_sampling,
    sampling_difference,
)
from jaxpost.objectives.sequences import exists, per_example
from jaxpost.options import check_choices, option


@dataclass(frozen=True, kw_only=True)
class RLOO(ClippedBase):
    """The objective; rows are completions of the policy, see `objectives.online`."""

    beta: float = option(0.05, "Coefficient of the KL divergence from the reference, which is part of the reward.")
    normalize_advantages: bool = option(False, "Divide advantages by their deviation over the batch.")
    reward_clip_range: list[float] | None = option(None, "Least and greatest reward; null for no bounds.")
    baseline: str = option(
        "leave_one_out",
        "What rewards are compared with: leave_one_out, or batch (REINFORCE++).",
        choices=("leave_one_out", "batch"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if self.beta < 0:
            raise ConfigError(f"beta is {self.beta}; it must not be negative")
        check_bounds("reward_clip_range", self.reward_clip_range)

    @property
    def needs_reference(self) -> bool:
        return self.beta != 0

    @property
    def needs_equal_rewards(self) -> bool:
        """Their advantages are 0 where they are compared with each other alone."""
        compared = self.baseline == "leave_one_out" and not self.normalize_advantages
        return self.needs_reference or bool(self.router_aux_loss_coef) or not compared

    def appraise(
        self, policy: Model, reference: Model | None, batch: Batch, *, reused: bool, stale: bool = False
    ) -> Batch:
        batch, shape = self.trained(batch), batch["groups"].shape
        weighted = weighted_rewards(batch["rewards"].reshape(-1, batch["rewards"].shape[-1]), self.weights(batch))
        rewards, known = weighted[0].reshape(shape), weighted[1].reshape(shape) & exists(batch)
        if self.reward_clip_range is not None:
            rewards = jnp.clip(rewards, *self.reward_clip_range)
        if reused or stale or reference is not None:
            batch = {**batch, "old_logps": self.token_logps(policy, batch)}
        if stale:
            moved = per_example(moved_since_sampling(batch), batch)
            batch["importance"] = truncated_weight(moved, self.importance_sampling_cap)
        if reference is not None:
            batch["kl"] = batch["old_logps"] - self.token_logps(reference, batch)
            rewards = rewards - self.beta * per_example(batch["kl"], batch)
        flat = rewards.reshape(-1), batch["groups"].reshape(-1), known.reshape(-1)
        if self.baseline == "batch":
            advantages = standardised(flat[0], flat[2])
        else:
            advantages = leave_one_out_advantages(*flat, normalize=self.normalize_advantages)
        return {**batch, "advantages": advantages.reshape(shape)}

    def annotate(self, policy: Model, reference: Model | None, batch: Batch) -> Batch:
        return batch

    def loss(self, model: Model, batch: Batch) -> tuple[Mean, Mapping[str, Metric]]:
        scores, mask, balance = score_batch(model, batch, temperature=self.temperature)
        old = batch["old_logps"] if "old_logps" in batch else lax.stop_gradient(scores.logps)
        ratio = jnp.exp(per_example(scores.logps - old, batch))
        advantages, present = batch["advantages"], exists(batch)
        losses = clipped_loss(ratio, advantages, epsilon_low=self.epsilon, epsilon_high=self.high)
        metrics: dict[str, Metric] = {"entropy": masked_mean(scores.entropy, mask)}
        if "importance" in batch:
            losses = losses * batch["importance"]
            metrics |= importance_metrics(batch["importance"], present)
        loss, routing = self.with_balance(masked_mean(losses, present), balance)
        if "kl" in batch:
            metrics["kl"] = masked_mean(batch["kl"], next_tokens(batch)[1])
        metrics |= clip_metrics(ratio, advantages, None, batch, low=self.epsilon, high=self.high)
        return loss, metrics | sampling_difference(scores.logps, batch) | routing
