"""What every method reports that judges completions one by one, by TRL's names."""

from jax import Array, lax
from jaxtyping import Bool, Float

from jaxpost.metrics import Contrast, Metric, masked_mean
from jaxpost.objectives.base import Batch
from jaxpost.objectives.logps import TokenScores
from jaxpost.objectives.sequences import exists, per_token


def judged_metrics(
    rewards: Float[Array, "B S"],
    logps: Float[Array, "B S"],
    scores: TokenScores,
    mask: Bool[Array, "B T"],
    batch: Batch,
) -> dict[str, Metric]:
    """Rewards, log-probabilities and logits of the desirable (TRL's chosen) and the others.

    Args:
        rewards: implied rewards of the examples.
        logps: log-probabilities of the completions.
        scores: of the tokens, with details.
        mask: tokens that are scored.
        batch: with `label`.
    """
    rewards, logps = lax.stop_gradient((rewards, logps))
    present, desirable = exists(batch), batch["label"] > 0
    chosen, rejected, of_desirable = present & desirable, present & ~desirable, per_token(batch["label"], batch) > 0
    of_chosen, of_rejected = masked_mean(rewards, chosen), masked_mean(rewards, rejected)
    return {
        "rewards/chosen": of_chosen,
        "rewards/rejected": of_rejected,
        "rewards/margins": Contrast(*of_chosen, *of_rejected),
        "logps/chosen": masked_mean(logps, chosen),
        "logps/rejected": masked_mean(logps, rejected),
        "logits/chosen": masked_mean(scores.mean_logit, mask & of_desirable),
        "logits/rejected": masked_mean(scores.mean_logit, mask & ~of_desirable),
        "entropy": masked_mean(scores.entropy, mask),
    }
