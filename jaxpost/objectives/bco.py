"""Binary classifier optimisation: completions that are judged one by one, told apart around a running shift.

    x_i = beta log pi(y_i|x_i)/ref(y_i|x_i),  d = the mean of all x so far
    L = -log sigma(x_i - d) where y_i is desirable,  -w_i log sigma(-(x_i - d)) where it is not

Jung et al., 2024, "Binary Classifier Optimization for Large Language Model Alignment", arXiv:2404.04656, equation 14.
w_i is how much more frequent its prompt is among desirable examples, where batches tell it, else 1: `density_ratio`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxpost.errors import ConfigError
from jaxpost.metrics import Mean, Metric, masked_mean
from jaxpost.objectives.base import Batch, Model, ObjectiveBase
from jaxpost.objectives.bco_losses import bco_loss
from jaxpost.objectives.judged_metrics import judged_metrics
from jaxpost.objectives.logps import score_batch
from jaxpost.objectives.sequences import exists, per_example, sequence_logps
from jaxpost.options import option


@dataclass(frozen=True, kw_only=True)
class BCO(ObjectiveBase):
    """The objective; `label` [B, S] is 1 for desirable examples, `rewards_total` and `rewards_count` [B] go round.

    `weight` [B, S], if there is one, is what the loss of each example is multiplied with.
    """

    remembers: ClassVar[tuple[str, ...]] = ("rewards_total", "rewards_count")

    beta: float = option(0.1, "How close the policy stays to the reference; more is closer.")

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"beta is {self.beta}; it must be above 0")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_mismatches(self) -> bool:
        """It compares with no completions of other prompts."""
        return False

    def annotate(self, policy: Model, reference: Model | None, batch: Batch) -> Batch:
        if "ref_logps" not in batch:
            assert reference is not None
            batch = {**batch, "ref_logps": sequence_logps(reference, batch)}
        present = exists(batch)
        seen = jnp.sum(jnp.where(present, self.rewards(policy, batch), 0.0))
        return {
            **batch,
            "rewards_total": batch["rewards_total"] + seen,
            "rewards_count": batch["rewards_count"] + jnp.sum(present),
        }

    def loss(self, model: Model, batch: Batch) -> tuple[Mean, Mapping[str, Metric]]:
        scores, mask, balance = score_batch(model, batch, details=True)
        logps, present = per_example(scores.logps, batch), exists(batch)
        rewards = self.beta * (logps - batch["ref_logps"])
        shift = (batch["rewards_total"] / jnp.maximum(batch["rewards_count"], 1))[:, None]
        losses = bco_loss(rewards, shift, batch["label"], batch.get("weight", 1.0))
        loss, routing = self.with_balance(masked_mean(losses, present), balance)
        metrics = judged_metrics(rewards, logps, scores, mask, batch) | routing
        return loss, {"delta": masked_mean(jnp.broadcast_to(shift, present.shape), present), **metrics}

    def rewards(self, model: Model, batch: Batch) -> Float[Array, "B S"]:
        return self.beta * (sequence_logps(model, batch) - batch["ref_logps"])
