"""Kahneman-Tversky optimisation: completions that are judged one by one.

    z = max(0, E[log pi(y'|x)/ref(y'|x)]),  x_i = log pi(y_i|x_i)/ref(y_i|x_i)
    L = w_D (1 - sigma(beta (x_i - z))) where y_i is desirable,  w_U (1 - sigma(beta (z - x_i))) where it is not

Ethayarajh et al., 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv:2402.01306, equations 6 to 8.
z is estimated from prompts with completions of other examples, the y'; each prompt keeps its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxpost.errors import ConfigError
from jaxpost.metrics import Mean, Metric, masked_mean
from jaxpost.objectives.base import Batch, Model, ObjectiveBase
from jaxpost.objectives.judged_metrics import judged_metrics
from jaxpost.objectives.kto_losses import apo_zero_unpaired, kl_estimate, kto_loss
from jaxpost.objectives.logps import score_batch
from jaxpost.objectives.sequences import exists, per_example, sequence_logps
from jaxpost.options import check_choices, option

LOSS_TYPES = ("kto", "apo_zero_unpaired")
MISMATCHED = "mismatched_"


@dataclass(frozen=True, kw_only=True)
class KTO(ObjectiveBase):
    """The objective; `label` [B, S] is 1 for desirable examples, `mismatched_*` are other rows of as many examples."""

    beta: float = option(0.1, "How close the policy stays to the reference; more is closer.")
    loss_type: str = option("kto", f"Loss: {', '.join(LOSS_TYPES)}.", choices=LOSS_TYPES)
    desirable_weight: float = option(1.0, "Weight of the desirable completions.")
    undesirable_weight: float = option(1.0, "Weight of the undesirable completions.")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if vars(self)[name] <= 0:
                raise ConfigError(f"{name} is {vars(self)[name]}; it must be above 0")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_mismatches(self) -> bool:
        """Whether the loss is told how far the policy has moved on completions of other prompts."""
        return self.loss_type == "kto"

    @property
    def reference_columns(self) -> tuple[str, ...]:
        return ("ref_logps", "ref_kl_logps") if self.needs_mismatches else ("ref_logps",)

    def annotate(self, policy: Model, reference: Model | None, batch: Batch) -> Batch:
        others = {name.removeprefix(MISMATCHED): x for name, x in batch.items() if name.startswith(MISMATCHED)}
        others |= {"examples": batch["examples"]}
        batch = {name: column for name, column in batch.items() if not name.startswith(MISMATCHED)}
        for name, rows in zip(self.reference_columns, (batch, others), strict=False):
            if name not in batch:
                assert reference is not None
                batch = {**batch, name: sequence_logps(reference, rows)}
        kl = jnp.zeros(())
        if self.needs_mismatches:
            kl = kl_estimate(sequence_logps(policy, others), batch["ref_kl_logps"], exists(batch))
        return {**batch, "kl": jnp.broadcast_to(kl, batch["examples"].shape)}

    def loss(self, model: Model, batch: Batch) -> tuple[Mean, Mapping[str, Metric]]:
        scores, mask, balance = score_batch(model, batch, details=True)
        logps, present = per_example(scores.logps, batch), exists(batch)
        logratios = logps - batch["ref_logps"]
        options = {
            "beta": self.beta,
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }
        if self.loss_type == "kto":
            losses = kto_loss(logratios, batch["kl"], batch["label"], **options)
        else:
            losses = apo_zero_unpaired(logratios, batch["label"], **options)
        loss, routing = self.with_balance(masked_mean(losses, present), balance)
        metrics = judged_metrics(self.beta * logratios, logps, scores, mask, batch) | routing
        return loss, {"kl": masked_mean(batch["kl"], present), **metrics}

    def rewards(self, model: Model, batch: Batch) -> Float[Array, "B S"]:
        return self.beta * (sequence_logps(model, batch) - batch["ref_logps"])
