"""What every method reports that judges completions one by one, by TRL's names."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxpost.metrics import Mean, masked_mean
from jaxpost.objectives.base import Batch
from jaxpost.objectives.logps import TokenScores
from jaxpost.objectives.sequences import exists, per_token


def margin_share(batch: Batch) -> Float[Array, "B S"]:
    """What each reward counts in `rewards/margins`, a difference of two means; of the whole batch of a step.

    Each example counts as much as all are to those of its label, and none does where a label has none.
    """
    present, desirable = exists(batch), exists(batch) & (batch["label"] > 0)
    counts = jnp.sum(desirable), jnp.sum(present & ~desirable)
    shares = [jnp.sum(present) / jnp.maximum(count, 1) for count in counts]
    return jnp.where(desirable, shares[0], -shares[1]) * (counts[0] > 0) * (counts[1] > 0)


def judged_metrics(
    rewards: Float[Array, "B S"],
    logps: Float[Array, "B S"],
    scores: TokenScores,
    mask: Bool[Array, "B T"],
    batch: Batch,
) -> dict[str, Mean]:
    """Rewards, log-probabilities and logits of the desirable (TRL's chosen) and the others.

    Args:
        rewards: implied rewards of the examples.
        logps: log-probabilities of the completions.
        scores: of the tokens, with details.
        mask: tokens that are scored.
        batch: with `label` and `margin_share`.
    """
    rewards, logps = lax.stop_gradient((rewards, logps))
    present, desirable = exists(batch), batch["label"] > 0
    chosen, rejected, of_desirable = present & desirable, present & ~desirable, per_token(batch["label"], batch) > 0
    return {
        "rewards/chosen": masked_mean(rewards, chosen),
        "rewards/rejected": masked_mean(rewards, rejected),
        "rewards/margins": masked_mean(rewards * batch["margin_share"], present),
        "logps/chosen": masked_mean(logps, chosen),
        "logps/rejected": masked_mean(logps, rejected),
        "logits/chosen": masked_mean(scores.mean_logit, mask & of_desirable),
        "logits/rejected": masked_mean(scores.mean_logit, mask & ~of_desirable),
        "entropy": masked_mean(scores.entropy, mask),
    }
