"""What every method that compares completions reports, by TRL's names."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxpost.metrics import Mean, masked_mean
from jaxpost.objectives.base import Batch
from jaxpost.objectives.logps import TokenScores
from jaxpost.objectives.sequences import exists, pairs_of


def pair_metrics(
    rewards: Float[Array, "B S"],
    logps: Float[Array, "B S"],
    scores: TokenScores,
    mask: Bool[Array, "B T"],
    batch: Batch,
) -> dict[str, Mean]:
    """Rewards, log-probabilities and logits of the chosen and the rejected.

    Args:
        rewards: implied rewards of the examples.
        logps: log-probabilities of the completions, as the loss has them.
        scores: of the tokens, with details.
        mask: tokens that are scored.
        batch: of pairs.
    """
    present = pairs_of(exists(batch))[0]
    (chosen, rejected), (chosen_logps, rejected_logps) = pairs_of(lax.stop_gradient(rewards)), pairs_of(logps)
    of_chosen = mask & chosen_tokens(batch)
    return {
        "rewards/chosen": masked_mean(chosen, present),
        "rewards/rejected": masked_mean(rejected, present),
        "rewards/margins": masked_mean(chosen - rejected, present),
        "rewards/accuracies": masked_mean((chosen > rejected).astype(jnp.float32), present),
        "logps/chosen": masked_mean(lax.stop_gradient(chosen_logps), present),
        "logps/rejected": masked_mean(lax.stop_gradient(rejected_logps), present),
        "logits/chosen": masked_mean(scores.mean_logit, of_chosen),
        "logits/rejected": masked_mean(scores.mean_logit, mask & ~of_chosen),
        "entropy": masked_mean(scores.entropy, mask),
        "mean_token_accuracy": masked_mean(scores.top, of_chosen),
    }


def chosen_tokens(batch: Batch) -> Bool[Array, "B T"]:
    """Tokens of chosen examples, which are the odd segments."""
    return batch["segments"] % 2 == 1
