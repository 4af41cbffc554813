"""Preference optimisation without a reference: CPO, SimPO and AlphaPO.

    CPO:     L = -log sigma(beta (log pi(y_w|x) - log pi(y_l|x))) + cpo_alpha NLL(y_w|x)
    SimPO:   L = -log sigma(beta (log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|) - gamma)
    AlphaPO: SimPO with (1 - p^-alpha) / alpha for log p, where log p is the mean over the completion

Xu et al., 2024, "Contrastive Preference Optimization", arXiv:2401.08417, equation 3 and 5; Meng et al., 2024, "SimPO:
Simple Preference Optimization with a Reference-Free Reward", arXiv:2405.14734, equation 6; Gupta et al., 2025,
"AlphaPO: Reward Shape Matters for LLM Alignment", arXiv:2501.03884.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jax import Array, lax
from jaxtyping import Bool, Float

from jaxpost.errors import ConfigError
from jaxpost.metrics import Mean, Metric, masked_mean
from jaxpost.objectives.base import Batch, Model, ObjectiveBase
from jaxpost.objectives.cpo_losses import CPO_LOSSES, alpha_reward, cpo_loss
from jaxpost.objectives.logps import TokenScores, next_tokens, score_batch
from jaxpost.objectives.pair_metrics import chosen_tokens, pair_metrics
from jaxpost.objectives.sequences import exists, mean_per_example, pairs_of, per_example, token_share
from jaxpost.options import check_choices, option

BY_MEAN = ("ipo", "simpo")  # loss types of the mean log-probability of a completion, not the sum


@dataclass(frozen=True, kw_only=True)
class CPO(ObjectiveBase):
    """The objective; rows are pairs of examples."""

    beta: float = option(0.1, "Scale of the log-probabilities.")
    loss_type: str = option("sigmoid", f"Loss: {', '.join(CPO_LOSSES)}.", choices=CPO_LOSSES)
    label_smoothing: float = option(0.0, "Share of the pairs that are taken to be the wrong way round.")
    cpo_alpha: float = option(1.0, "Weight of the NLL of the chosen completions.")
    simpo_gamma: float = option(0.5, "Margin that simpo asks for.")
    alpha: float = option(0.0, "Shape of AlphaPO's reward; 0 for the log-probability.")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.beta <= 0:
            raise ConfigError(f"beta is {self.beta}; it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5")
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            raise ConfigError(f"label_smoothing does nothing with loss_type {self.loss_type}; leave it out")
        if self.cpo_alpha < 0:
            raise ConfigError(f"cpo_alpha is {self.cpo_alpha}; it must not be negative")

    @property
    def needs_reference(self) -> bool:
        return False

    def annotate(self, policy: Model, reference: Model | None, batch: Batch) -> Batch:
        return {**batch, "nll_share": token_share(next_tokens(batch)[1] & chosen_tokens(batch), batch)}

    def loss(self, model: Model, batch: Batch) -> tuple[Mean, Mapping[str, Metric]]:
        scores, mask, balance = score_batch(model, batch, details=True)
        sums, present = per_example(scores.logps, batch), pairs_of(exists(batch))[0]
        logps = self._of_completions(scores, mask, batch)
        rewards = alpha_reward(logps, self.alpha)
        losses = cpo_loss(
            self.loss_type,
            *pairs_of(rewards),
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            simpo_gamma=self.simpo_gamma,
        )
        if self.cpo_alpha:
            losses = losses - self.cpo_alpha * pairs_of(sums)[0] * batch["nll_share"]
        loss, routing = self.with_balance(masked_mean(losses, present), balance)
        metrics = pair_metrics(self.beta * rewards, logps, scores, mask, batch) | routing
        if self.cpo_alpha:
            metrics["nll_loss"] = masked_mean(-scores.logps, mask & chosen_tokens(batch))
        return loss, metrics

    def rewards(self, model: Model, batch: Batch) -> Float[Array, "B S"]:
        scores, mask, _ = score_batch(model, batch)
        return self.beta * alpha_reward(lax.stop_gradient(self._of_completions(scores, mask, batch)), self.alpha)

    def _of_completions(self, scores: TokenScores, mask: Bool[Array, "B T"], batch: Batch) -> Float[Array, "B S"]:
        """Log-probabilities as the loss takes them: of the completion, or the mean over its tokens."""
        if self.loss_type in BY_MEAN:
            return mean_per_example(scores.logps, mask, batch)
        return per_example(scores.logps, batch)
