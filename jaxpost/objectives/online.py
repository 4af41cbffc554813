"""What the methods share that learn from completions of the policy itself.

A batch tells of every completion: `rewards` [B, S, F], NaN where a function has nothing to say; `groups` [B, S], the
number of its prompt; `ended` [B, S], 0 where it was cut; `num_trained` [B, S], how many of its tokens are trained on;
`sampled_logps` [B, T], what the sampler said of its tokens, at the position that predicts each. The tokens themselves
are not there where the objective says that they add nothing.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxpost.errors import ConfigError
from jaxpost.metrics import Metric, greatest, least, masked_mean
from jaxpost.objectives.base import Batch, Model, Objective, ObjectiveBase
from jaxpost.objectives.logps import next_tokens, score_batch
from jaxpost.objectives.sequences import exists, mean_per_example, per_token
from jaxpost.options import option


@runtime_checkable
class OnlineObjective(Objective, Protocol):
    """An objective whose batches are made with the policy."""

    def appraise(
        self, policy: Model, reference: Model | None, batch: Batch, *, reused: bool, stale: bool = False
    ) -> Batch:
        """Add what belongs to the moment of sampling: sees all completions of one generation, before the first step.

        `reused`: more than one optimizer step is taken with them, so that the policy moves away from what sampled them.
        `stale`: it has moved away already.
        """
        ...

    @property
    def needs_equal_rewards(self) -> bool:
        """Whether completions add to the gradient where all of a prompt are rewarded alike."""
        ...


@dataclass(frozen=True, kw_only=True)
class OnlineBase(ObjectiveBase):
    """The fields they share; names are TRL's."""

    temperature: float = option(1.0, "Softmax temperature of sampling, which also divides the logits in training.")
    max_completion_length: int = option(512, "Longest completion, in tokens.")
    reward_weights: list[float] | None = option(None, "Weight of each reward function; null for 1.")
    mask_truncated_completions: bool = option(False, "Do not learn from completions that were cut.")

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be above 0 to learn from what is sampled")
        if self.max_completion_length < 1:
            raise ConfigError(f"max_completion_length is {self.max_completion_length}; it must be at least 1")

    @property
    def needs_equal_rewards(self) -> bool:
        """See OnlineObjective; True unless a method knows better."""
        return True

    def weights(self, batch: Batch) -> Float[Array, "F"]:
        """Of the reward functions."""
        count = batch["rewards"].shape[-1]
        return jnp.ones(count) if self.reward_weights is None else jnp.asarray(self.reward_weights, jnp.float32)

    def token_logps(self, model: Model, batch: Batch) -> Float[Array, "B T"]:
        """Log-probability of each completion's tokens, at the position that predicts it; no gradient is kept."""
        return lax.stop_gradient(score_batch(model, batch, temperature=self.temperature)[0].logps)

    def trained(self, batch: Batch) -> Batch:
        """The batch, where nothing of completions that were cut is trained on if the config says so."""
        if not self.mask_truncated_completions:
            return batch
        kept = {"num_trained": batch["num_trained"] * batch["ended"]}
        return {**batch, **kept, "loss_mask": batch["loss_mask"] * per_token(batch["ended"], batch)}


@dataclass(frozen=True, kw_only=True)
class ClippedBase(OnlineBase):
    """What GRPO and its kin share beside: the bounds of the ratio, by their names for them."""

    epsilon: float = option(0.2, "How far below 1 the ratio of probabilities counts.")
    epsilon_high: float | None = option(None, "How far above 1 it does; null for epsilon.")
    importance_sampling_cap: float = option(
        3.0, "generate_ahead: greatest weight of what an earlier policy has sampled (truncated importance sampling)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epsilon", "epsilon_high", "importance_sampling_cap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")

    @property
    def high(self) -> float:
        """Bound of the ratio, above 1."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


def moved_since_sampling(batch: Batch) -> Float[Array, "B T"]:
    """Log of how much likelier each token of a completion was to the policy at appraisal than when it was sampled."""
    return jnp.where(next_tokens(batch)[1], batch["old_logps"] - batch["sampled_logps"], 0.0)


def importance_metrics(
    weight: Float[Array, "B S"] | Float[Array, "B T"], mask: Bool[Array, "B S"] | Bool[Array, "B T"]
) -> dict[str, Metric]:
    """Of the weights of what an earlier policy has sampled."""
    name = "sampling/importance_sampling_ratio"
    return {
        f"{name}/min": least(weight, mask),
        f"{name}/mean": masked_mean(weight, mask),
        f"{name}/max": greatest(weight, mask),
    }


def check_bounds(name: str, bounds: list[float] | None) -> None:
    """Raise ConfigError if they are given and are not two numbers, the least first."""
    if bounds is not None and (len(bounds) != 2 or bounds[0] >= bounds[1]):
        raise ConfigError(f"{name} is {bounds}; give the least reward and the greatest")


def sampling_difference(logps: Float[Array, "B T"], batch: Batch) -> dict[str, Metric]:
    """How far the sampler's log-probabilities are from those of the model that samples."""
    if "sampled_logps" not in batch:
        return {}
    mask = next_tokens(batch)[1]
    everywhere = jnp.ones_like(mask)
    before = batch["old_logps"] if "old_logps" in batch else lax.stop_gradient(logps)
    difference = jnp.where(mask, jnp.abs(before - batch["sampled_logps"]), 0.0)
    return {
        "sampling/sampling_logp_difference/mean": masked_mean(difference, mask),
        "sampling/sampling_logp_difference/max": greatest(difference, everywhere),
    }


def clip_metrics(
    ratio: Float[Array, "B S"] | Float[Array, "B T"],
    advantages: Float[Array, "B S"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"] | None,
    batch: Batch,
    *,
    low: float,
    high: float,
) -> dict[str, Metric]:
    """How often the clip took effect; of tokens under a mask, or of whole completions where that is None."""
    is_low, is_high = (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    where = exists(batch) if mask is None else mask
    both = is_low | is_high
    shares = [x.astype(jnp.float32) for x in (is_low, is_high)]
    per_sequence = shares if mask is None else [mean_per_example(x, mask, batch) for x in shares]
    return {
        "clip_ratio/low_mean": masked_mean(shares[0], where),
        "clip_ratio/low_min": least(per_sequence[0], exists(batch)),
        "clip_ratio/high_mean": masked_mean(shares[1], where),
        "clip_ratio/high_max": greatest(per_sequence[1], exists(batch)),
        "clip_ratio/region_mean": masked_mean(both.astype(jnp.float32), where),
    }
