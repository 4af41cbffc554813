"""Proximal policy optimisation: a token is as good as what follows is better than a value model expected.

    r_t = -beta kl_t,  r_last += score,  delta_t = r_t + gamma V_{t+1} - V_t,  A_t = sum_l (gamma lam)^l delta_{t+l}
    L = -mean_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)
        + c/2 mean_t max((V_t - R_t)^2, (clip(V_t, old V_t - eps', old V_t + eps') - R_t)^2),  R_t = A_t + old V_t

Schulman et al., 2017, "Proximal Policy Optimization Algorithms", arXiv:1707.06347, equation 9, on language models with
the reward of Ziegler et al., 2019, "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, equation 2.
A in L is whitened over the tokens of a generation. As in TRL, which follows Stiennon et al., 2020, arXiv:2009.01325, a
completion with room left has one state more: the one that has read its last token, where the score is given.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxpost.errors import ConfigError
from jaxpost.metrics import Mean, Metric, masked_mean, masked_variance
from jaxpost.objectives.base import Batch, Model
from jaxpost.objectives.grpo_losses import clipped_loss, weighted_rewards
from jaxpost.objectives.logps import TokenScores, next_tokens, score_tokens
from jaxpost.objectives.online import OnlineBase, check_bounds, clip_metrics, sampling_difference
from jaxpost.objectives.ppo_losses import KL_ESTIMATORS, controlled, gae, kl_estimate, value_losses, whitened
from jaxpost.objectives.sequences import exists, mean_per_example, per_example, per_token
from jaxpost.options import check_choices, option
from jaxpost.sharding import path_of

CRITIC = "critic"  # the first name of the paths of what belongs to the value model alone


@runtime_checkable
class ActorCritic(Model, Protocol):
    """A policy with a value model."""

    def values(
        self,
        h: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
        """The value of having read each token, `h` being what the policy makes of it; and a load-balancing loss."""
        ...


@dataclass(frozen=True, kw_only=True)
class PPO(OnlineBase):
    """The objective; rows are completions of the policy, see `objectives.online`. Names and defaults are TRL's."""

    remembers: ClassVar[tuple[str, ...]] = ("kl_log_factor", "generation", "held_generation")

    temperature: float = option(0.7, "Softmax temperature of sampling, which also divides the logits in training.")
    gamma: float = option(1.0, "Discount of later rewards.")
    lam: float = option(0.95, "Lambda of generalised advantage estimation.")
    kl_coef: float = option(0.05, "Coefficient of the KL divergence from the reference; 0 for no reference.")
    kl_estimator: str = option("k1", "Estimator of that divergence: k1 or k3.", choices=KL_ESTIMATORS)
    adap_kl_ctrl: bool = option(False, "Move kl_coef to keep the divergence of completions at target_kl.")
    target_kl: float = option(6.0, "Divergence that adap_kl_ctrl aims at, nats a completion.")
    horizon: float = option(10000.0, "Completions in which adap_kl_ctrl can change kl_coef by a fifth.")
    cliprange: float = option(0.2, "How far from 1 the ratio of probabilities counts.")
    cliprange_value: float = option(0.2, "How far from the value at sampling a value counts.")
    vf_coef: float = option(0.1, "Coefficient of the value model's loss.")
    entropy_coef: float = option(0.0, "Coefficient of the mean entropy of tokens, which is rewarded.")
    whiten_rewards: bool = option(False, "Divide the rewards of tokens by their deviation.")
    missing_eos_penalty: float | None = option(None, "What is taken off the score of completions that were cut.")
    reward_clip_range: list[float] | None = option(None, "Least and greatest score; null for no bounds.")
    max_kl: float | None = option(
        None,
        "Divergence of the policy from itself at sampling, nats a token, above which the rest of the steps of a "
        "generation leave it as it is; null for no bound.",
    )
    value_warmup_steps: int = option(0, "Optimizer steps at the start in which only the value model learns.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        for name in ("kl_coef", "vf_coef", "entropy_coef", "value_warmup_steps", "missing_eos_penalty"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("cliprange", "cliprange_value", "target_kl", "horizon", "max_kl"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")
        if self.adap_kl_ctrl and self.kl_coef == 0:
            raise ConfigError("adap_kl_ctrl multiplies kl_coef, which is 0; give it a kl_coef to start from")
        check_bounds("reward_clip_range", self.reward_clip_range)

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef != 0

    def appraise(
        self, policy: Model, reference: Model | None, batch: Batch, *, reused: bool, stale: bool = False
    ) -> Batch:
        assert isinstance(policy, ActorCritic) and not stale
        batch, scores, known = self._scored(self.trained(batch))
        mask, ends = next_tokens(batch)[1], _ends(batch)
        lengths = per_example(batch["loss_mask"], batch)
        has_room = per_token((lengths < self.max_completion_length).astype(jnp.float32), batch) > 0
        before_end = mask & jnp.roll(ends, -1, axis=1)
        states = mask | (ends & has_room)
        said, values, _ = read(policy, batch, temperature=self.temperature)
        logps = lax.stop_gradient(said.logps)
        values = jnp.where(states, lax.stop_gradient(values), 0.0)
        kl = jnp.zeros_like(logps)
        if reference is not None:
            kl = jnp.where(mask, kl_estimate(logps, self.token_logps(reference, batch), self.kl_estimator), 0.0)
        penalties = -self._coefficient(batch) * kl
        rewards = penalties + jnp.where(jnp.where(has_room, ends, before_end), per_token(scores, batch), 0.0)
        if self.whiten_rewards:
            rewards = whitened(rewards, states, shift_mean=False)
        advantages, returns = gae(rewards, values, states, batch["segments"], gamma=self.gamma, lam=self.lam)
        advantages = whitened(advantages, mask)
        batch |= {"old_logps": logps, "old_values": values, "returns": returns, "token_advantages": advantages}
        batch |= {"states": states.astype(jnp.float32), "known": known.astype(jnp.float32), "scores": scores}
        batch |= {"kl": per_example(kl, batch), "non_score_reward": per_example(penalties, batch)}
        batch["advantages"] = mean_per_example(advantages, mask, batch)
        return batch | self._afterwards(batch)

    def annotate(self, policy: Model, reference: Model | None, batch: Batch) -> Batch:
        mask, rows = next_tokens(batch)[1], len(batch["tokens"])
        generation, held = batch["next_generation"][0], jnp.zeros((), bool)
        if self.max_kl is not None:
            moved = self.token_logps(policy, batch) - batch["old_logps"]
            too_far = masked_mean(0.5 * moved * moved, mask).value() > self.max_kl
            held = too_far | (batch["held_generation"][0] == generation)
        share = jnp.sum(mask) / jnp.maximum(jnp.sum(batch["states"]), 1)
        return {
            **batch,
            "kl_log_factor": batch["next_kl_log_factor"],
            "generation": batch["next_generation"],
            "held_generation": jnp.where(held, generation, batch["held_generation"]),
            "learns": jnp.full(rows, 1.0 - held),
            "state_share": jnp.full(rows, share),
        }

    def loss(self, model: Model, batch: Batch) -> tuple[Mean, Mapping[str, Metric]]:
        assert isinstance(model, ActorCritic)
        mask, states = next_tokens(batch)[1], batch["states"] > 0
        said, values, balance = read(
            model, batch, temperature=self.temperature, entropy_gradient=self.entropy_coef != 0
        )
        moved = said.logps - batch["old_logps"]
        ratio, advantages, learns = jnp.exp(moved), batch["token_advantages"], batch["learns"][:, None]
        losses = clipped_loss(ratio, advantages, epsilon_low=self.cliprange, epsilon_high=self.cliprange)
        free, kept = value_losses(values, batch["old_values"], batch["returns"], clip=self.cliprange_value)
        policy_loss = masked_mean(losses, mask)
        of_states = 0.5 * jnp.maximum(free, kept)
        value_loss = masked_mean(of_states, states)
        total = jnp.sum(jnp.where(mask, learns * (losses - self.entropy_coef * said.entropy), 0.0))
        # A mean over states stands beside one over tokens, which are fewer.
        total += self.vf_coef * jnp.sum(jnp.where(states, of_states * batch["state_share"][:, None], 0.0))
        loss, routing = self.with_balance(Mean(total, policy_loss.count), balance)
        is_clipped = (losses > -advantages * ratio).astype(jnp.float32)
        metrics: dict[str, Metric] = {
            "policy/approxkl_avg": masked_mean(0.5 * moved * moved, mask),
            "policy/clipfrac_avg": masked_mean(is_clipped, mask),
            "policy/entropy_avg": masked_mean(said.entropy, mask),
            "loss/policy_avg": policy_loss,
            "loss/value_avg": value_loss,
            "val/clipfrac_avg": masked_mean((kept > free).astype(jnp.float32), states),
            "val/ratio": masked_mean(ratio, mask),
            "val/ratio_var": masked_variance(ratio, mask, around=1.0),
        }
        if self.max_kl is not None:
            metrics["policy/held"] = masked_mean(1 - batch["learns"], jnp.ones_like(batch["learns"], bool))
        metrics |= self._objective_metrics(batch)
        metrics |= clip_metrics(ratio, advantages, mask, batch, low=self.cliprange, high=self.cliprange)
        return loss, metrics | sampling_difference(said.logps, batch) | routing

    def taken(self, updates: Any, batch: Batch, step: Int[Array, ""]) -> Any:
        """Those of the policy not while the value model warms up, or the policy is held where it is."""
        if self.max_kl is None and not self.value_warmup_steps:
            return updates
        learns = jnp.where(step < self.value_warmup_steps, 0.0, batch["learns"][0])

        def take(path: Any, update: Array) -> Array:
            return update if path_of(path).startswith(f"{CRITIC}.") else (update * learns).astype(update.dtype)

        return jax.tree_util.tree_map_with_path(take, updates)

    def _scored(self, batch: Batch) -> tuple[Batch, Float[Array, "B S"], Bool[Array, "B S"]]:
        """The batch without tokens of completions of which nothing is known; the scores, and where there is one."""
        shape = batch["groups"].shape
        summed = weighted_rewards(batch["rewards"].reshape(-1, batch["rewards"].shape[-1]), self.weights(batch))
        scores, known = summed[0].reshape(shape), summed[1].reshape(shape) & exists(batch)
        if self.reward_clip_range is not None:
            scores = jnp.clip(scores, *self.reward_clip_range)
        scores = scores - (self.missing_eos_penalty or 0.0) * (batch["ended"] == 0)
        known_tokens = per_token(known.astype(jnp.float32), batch)
        return {**batch, "loss_mask": batch["loss_mask"] * known_tokens}, jnp.where(known, scores, 0.0), known

    def _coefficient(self, batch: Batch) -> Float[Array, ""]:
        return self.kl_coef * jnp.exp(batch["kl_log_factor"][0])

    def _afterwards(self, batch: Batch) -> Batch:
        """What is remembered from the first step with a generation on."""
        rows, known = len(batch["tokens"]), batch["known"] > 0
        factor = batch["kl_log_factor"][0]
        if self.adap_kl_ctrl:
            mean = masked_mean(batch["kl"], known)
            moved = controlled(factor, mean.value(), mean.count, target=self.target_kl, horizon=self.horizon)
            factor = jnp.where(mean.count > 0, moved, factor)
        return {
            "next_kl_log_factor": jnp.full(rows, factor),
            "next_generation": batch["generation"] + 1,
            "kl_coef_now": jnp.full(rows, self._coefficient(batch)),
            "num_completions": jnp.full(rows, jnp.sum(batch["examples"])),
        }

    def _objective_metrics(self, batch: Batch) -> dict[str, Metric]:
        """What is said of completions as they were sampled."""
        known, present = batch["known"] > 0, exists(batch)
        mask = next_tokens(batch)[1]
        surprise = per_example(jnp.where(mask, -batch["old_logps"], 0.0), batch)
        ended = batch["ended"] * batch["num_completions"][:, None]  # the mean of which is their number
        metrics: dict[str, Metric] = {
            "objective/kl": masked_mean(batch["kl"], known),
            "objective/entropy": masked_mean(surprise, known),
            "objective/non_score_reward": masked_mean(batch["non_score_reward"], known),
            "objective/rlhf_reward": masked_mean(batch["non_score_reward"] + batch["scores"], known),
            "objective/scores": masked_mean(batch["scores"], known),
            "val/num_eos_tokens": masked_mean(ended, present),
        }
        if self.adap_kl_ctrl:
            metrics["objective/kl_coef"] = masked_mean(batch["kl_coef_now"], jnp.ones_like(batch["kl_coef_now"], bool))
        return metrics


def read(model: ActorCritic, batch: Batch, **options: Any) -> tuple[TokenScores, Float[Array, "B T"], Float[Array, ""]]:
    """What policy and value model say of a batch: scores of its trained tokens, values, load-balancing loss."""
    targets, mask = next_tokens(batch)
    places = {name: batch[name] for name in ("tokens", "positions", "segments")}
    h, balance = model.hidden(**places)
    values, more = model.values(h, **places)
    return score_tokens(model, h, targets, mask, **options), values, balance + more


def _ends(batch: Batch) -> Bool[Array, "B T"]:
    """The last token of each completion that is trained on."""
    segments = batch["segments"]
    last = jnp.arange(segments.shape[1]) == segments.shape[1] - 1
    return (batch["loss_mask"] > 0) & ((segments != jnp.roll(segments, -1, axis=1)) | last)
