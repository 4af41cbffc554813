"""Odds-ratio preference optimisation: fine-tuning on the chosen and a penalty on the rejected, without a reference.

    L = NLL(x, y_w) - beta log sigma(log odds(y_w|x) - log odds(y_l|x)),  odds(y|x) = p / (1 - p)

where log p is the mean log-probability of the completion's tokens. Hong et al., 2024, "ORPO: Monolithic Preference
Optimization without Reference Model", arXiv:2403.07691, equations 6 and 7. As in TRL the NLL is that of the prompt and
the completion, and beta is the paper's lambda.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxpost.errors import ConfigError
from jaxpost.metrics import Mean, Metric, masked_mean
from jaxpost.objectives.base import Batch, Model, ObjectiveBase
from jaxpost.objectives.logps import next_tokens, score_batch, score_tokens
from jaxpost.objectives.orpo_losses import log_odds_ratio
from jaxpost.objectives.pair_metrics import chosen_tokens, pair_metrics
from jaxpost.objectives.sequences import exists, mean_per_example, pairs_of, per_example, token_share
from jaxpost.options import option


@dataclass(frozen=True, kw_only=True)
class ORPO(ObjectiveBase):
    """The objective; rows are pairs of examples."""

    beta: float = option(0.1, "Weight of the odds ratio; the paper's lambda.")

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ConfigError(f"beta is {self.beta}; it must not be negative")

    @property
    def needs_reference(self) -> bool:
        return False

    def annotate(self, policy: Model, reference: Model | None, batch: Batch) -> Batch:
        return {**batch, "nll_share": token_share(every_token(batch) & chosen_tokens(batch), batch)}

    def loss(self, model: Model, batch: Batch) -> tuple[Mean, Mapping[str, Metric]]:
        targets, mask = next_tokens(batch)
        read = every_token(batch) & chosen_tokens(batch)
        h, balance = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
        scores = score_tokens(model, h, targets, mask | read, details=True)
        logps = mean_per_example(scores.logps, mask, batch)
        present = pairs_of(exists(batch))[0]
        log_odds = log_odds_ratio(*pairs_of(logps))
        ratios = jax.nn.log_sigmoid(log_odds)
        nll = -pairs_of(per_example(jnp.where(read, scores.logps, 0), batch))[0]
        losses = nll * batch["nll_share"] - self.beta * ratios
        loss, routing = self.with_balance(masked_mean(losses, present), balance)
        return loss, {
            **pair_metrics(self.beta * logps, logps, scores, mask, batch),
            "nll_loss": masked_mean(-scores.logps, read),
            "log_odds_ratio": masked_mean(ratios, present),
            "log_odds_chosen": masked_mean(log_odds, present),
        } | routing

    def rewards(self, model: Model, batch: Batch) -> Float[Array, "B S"]:
        scores, mask, _ = score_batch(model, batch)
        return self.beta * lax.stop_gradient(mean_per_example(scores.logps, mask, batch))


def every_token(batch: Batch) -> jax.Array:
    """Positions that have a next token in their example, [B, T]."""
    return next_tokens({**batch, "loss_mask": jnp.ones_like(batch["loss_mask"])})[1] & (batch["segments"] > 0)
