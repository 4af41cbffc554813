"""Supervised fine-tuning: negative log-likelihood of the trained tokens.

    nll:  L = -sum_t m_t log p(y_t | y_<t) / sum_t m_t
    dft:  L = -sum_t m_t sg(p(y_t | y_<t)) log p(y_t | y_<t) / sum_t m_t

dft is Wu et al., 2025, "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
arXiv:2508.05629, equation 9.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxpost.metrics import Mean, masked_mean
from jaxpost.objectives.base import Batch, Model, ObjectiveBase
from jaxpost.objectives.logps import sum_batch
from jaxpost.options import check_choices, option

LOSS_TYPES = ("nll", "dft")


def token_losses(logps: Float[Array, "*shape"], loss_type: str) -> Float[Array, "*shape"]:
    """Loss of each token from its log-probability, before masking."""
    if loss_type == "dft":
        return -lax.stop_gradient(jnp.exp(logps)) * logps
    return -logps


@dataclass(frozen=True, kw_only=True)
class SFT(ObjectiveBase):
    """The objective; rows are `tokens, positions, segments, loss_mask`."""

    loss_type: str = option(
        "nll", "Loss of a token: nll, or dft (weighted by its own probability).", choices=LOSS_TYPES
    )

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def needs_reference(self) -> bool:
        return False

    def annotate(self, policy: Model, reference: Model | None, batch: Batch) -> Batch:
        return batch

    def loss(self, model: Model, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        mean, scores, mask, balance = sum_batch(model, batch, partial(token_losses, loss_type=self.loss_type))
        loss, routing = self.with_balance(mean, balance)
        metrics = {
            "entropy": masked_mean(scores.entropy, mask),
            "mean_token_accuracy": masked_mean(scores.top, mask),
        }
        return loss, metrics | routing
