"""Reward models from comparisons.

    L = -log sigma(r(x, y_w) - r(x, y_l) - m) + c (r(x, y_w) + r(x, y_l))^2

Bradley and Terry, 1952, "Rank Analysis of Incomplete Block Designs"; Ouyang et al., 2022, "Training language models to
follow instructions with human feedback", arXiv:2203.02155, equation 1; the margin m is that of Touvron et al., 2023,
"Llama 2", arXiv:2307.09288, equation 2, the centring that of Eisenstein et al., 2023, "Helping or Herding?",
arXiv:2312.09244.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxpost.errors import ConfigError
from jaxpost.metrics import Mean, Metric, greatest, least, masked_mean
from jaxpost.objectives.base import Batch, Model, ObjectiveBase
from jaxpost.objectives.reward_losses import bradley_terry, centring
from jaxpost.objectives.sequences import exists, pairs_of, rewards_of
from jaxpost.options import option


@dataclass(frozen=True, kw_only=True)
class Reward(ObjectiveBase):
    """The objective; rows are pairs of examples, `margin` [B, S] stands at the chosen one."""

    center_rewards_coefficient: float | None = option(
        None, "Weight of the squared sum of a pair's rewards, which centres them at 0; null for none."
    )

    def __post_init__(self) -> None:
        coefficient = self.center_rewards_coefficient
        if coefficient is not None and coefficient < 0:
            raise ConfigError(f"center_rewards_coefficient is {coefficient}; it must not be negative")

    @property
    def needs_reference(self) -> bool:
        return False

    def annotate(self, policy: Model, reference: Model | None, batch: Batch) -> Batch:
        return batch

    def rewards(self, model: Model, batch: Batch) -> Float[Array, "B S"]:
        return lax.stop_gradient(rewards_of(model, batch)[0])

    def loss(self, model: Model, batch: Batch) -> tuple[Mean, Mapping[str, Metric]]:
        rewards, balance = rewards_of(model, batch)
        (chosen, rejected), present = pairs_of(rewards), pairs_of(exists(batch))[0]
        losses = bradley_terry(chosen, rejected, pairs_of(batch["margin"])[0])
        if self.center_rewards_coefficient:
            losses = losses + self.center_rewards_coefficient * centring(chosen, rejected)
        loss, routing = self.with_balance(masked_mean(losses, present), balance)
        rewards, chosen, rejected = lax.stop_gradient((rewards, chosen, rejected))
        return loss, {
            "accuracy": masked_mean((chosen > rejected).astype(jnp.float32), present),
            "margin": masked_mean(chosen - rejected, present),
            "mean_reward": masked_mean(rewards, exists(batch)),
            "min_reward": least(rewards, exists(batch)),
            "max_reward": greatest(rewards, exists(batch)),
        } | routing
