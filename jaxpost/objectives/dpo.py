"""Direct preference optimisation: the policy is its own reward model.

    L = -log sigma(beta (log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x)))

Rafailov et al., 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
arXiv:2305.18290, equation 7. The other losses of this kind stand with their sources in `dpo_losses`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxpost.errors import ConfigError
from jaxpost.metrics import Mean, Metric, masked_mean
from jaxpost.objectives.base import Batch, Model, ObjectiveBase
from jaxpost.objectives.dpo_losses import (
    F_DIVERGENCES,
    PAIR_LOSSES,
    PairLogps,
    aot_loss,
    aot_unpaired_loss,
    ld_weights,
    pair_loss,
    sorted_partners,
)
from jaxpost.objectives.logps import TokenScores, next_tokens, score_batch
from jaxpost.objectives.pair_metrics import chosen_tokens, pair_metrics
from jaxpost.objectives.sequences import exists, mean_per_example, pairs_of, per_example, per_token, token_share
from jaxpost.options import check_choices, option

LOSS_TYPES = (*PAIR_LOSSES, "aot", "aot_unpaired", "sft")


@dataclass(frozen=True, kw_only=True)
class DPO(ObjectiveBase):
    """The objective; rows are pairs of examples, `ref_logps` [B, S] what the reference says of each."""

    beta: float = option(0.1, "How close the policy stays to the reference; more is closer.")
    loss_type: list[str] = option(
        ["sigmoid"], f"Losses that are added up, of {', '.join(LOSS_TYPES)}.", choices=LOSS_TYPES
    )
    loss_weights: list[float] | None = option(None, "Weight of each of loss_type; 1 by default.")
    label_smoothing: float = option(0.0, "Share of the pairs that are taken to be the wrong way round.")
    f_divergence_type: str = option(
        "reverse_kl", f"Divergence from the reference: {', '.join(F_DIVERGENCES)}.", choices=F_DIVERGENCES
    )
    f_alpha_divergence_coef: float = option(0.5, "Alpha of alpha_divergence.")
    discopop_tau: float = option(0.05, "Temperature of the discopop loss.")
    use_weighting: bool = option(False, "Weight pairs by how probable the policy finds them (WPO).")
    ld_alpha: float | None = option(
        None, "Weight of the tokens beyond the length of the pair's shorter completion (LD-DPO); null for 1."
    )
    reference_free: bool = option(False, "Compare with a reference to which all completions are equally probable.")

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.loss_type:
            raise ConfigError(f"loss_type is empty; give one or more of {', '.join(LOSS_TYPES)}")
        if isinstance(self.loss_type, str):
            raise ConfigError(f"loss_type is {self.loss_type!r}; give a list: [{self.loss_type!r}]")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            counts = f"{len(self.loss_weights)} numbers for {len(self.loss_type)} of loss_type"
            raise ConfigError(f"loss_weights has {counts}; give as many")
        if self.beta <= 0:
            raise ConfigError(f"beta is {self.beta}; it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5")
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise ConfigError("exo_pair needs --label_smoothing above 0; its authors use 0.001")
        if self.discopop_tau <= 0:
            raise ConfigError(f"discopop_tau is {self.discopop_tau}; it must be above 0")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ConfigError(f"ld_alpha is {self.ld_alpha}; it must be from 0 to 1")
        if self.use_weighting and {"aot", "aot_unpaired"} & set(self.loss_type):
            raise ConfigError("use_weighting weights pairs, but aot and aot_unpaired compare across them; drop one")

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free and self.loss_type != ["sft"]

    def annotate(self, policy: Model, reference: Model | None, batch: Batch) -> Batch:
        if "ref_logps" not in batch:
            equal = jnp.zeros_like(batch["examples"])
            batch = {**batch, "ref_logps": equal if reference is None else self.sequence_logps(reference, batch)}
        if "sft" in self.loss_type:
            share = token_share(next_tokens(batch)[1] & chosen_tokens(batch), batch)
            batch = {**batch, "sft_share": share}
        if {"aot", "aot_unpaired"} & set(self.loss_type):
            batch |= self._partners(self.sequence_logps(policy, batch), batch)
        return batch

    def loss(self, model: Model, batch: Batch) -> tuple[Mean, Mapping[str, Metric]]:
        scores, mask, balance = score_batch(model, batch, details=True)
        logps = per_example(self._weighted(scores.logps, mask, batch), batch)
        present, lengths = pairs_of(exists(batch))[0], pairs_of(per_example(batch["loss_mask"], batch))
        pair = PairLogps(*pairs_of(logps), *pairs_of(batch["ref_logps"]), *lengths)
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        losses = jnp.zeros_like(pair.chosen)
        for kind, weight in zip(self.loss_type, weights, strict=True):
            losses += weight * self._pair_loss(kind, pair, scores, batch)
        if self.use_weighting:
            # Zhou et al., 2024, "WPO", arXiv:2406.11827, equation 2: how probable a completion's tokens are beside what
            # the policy samples, in the geometric mean.
            aligned = mean_per_example(scores.logps - scores.collision, mask, batch)
            chosen, rejected = pairs_of(lax.stop_gradient(jnp.exp(aligned)))
            losses = losses * chosen * rejected
        loss, routing = self.with_balance(masked_mean(losses, present), balance)
        logratios = logps - batch["ref_logps"]
        return loss, pair_metrics(self.beta * logratios, logps, scores, mask, batch) | routing

    def rewards(self, model: Model, batch: Batch) -> Float[Array, "B S"]:
        return self.beta * (self.sequence_logps(model, batch) - batch["ref_logps"])

    def sequence_logps(self, model: Model, batch: Batch) -> Float[Array, "B S"]:
        """Log-probability of each completion, less what `ld_alpha` takes off; no gradient is kept."""
        scores, mask, _ = score_batch(model, batch)
        return lax.stop_gradient(per_example(self._weighted(scores.logps, mask, batch), batch))

    def _weighted(self, logps: Float[Array, "B T"], mask: Bool[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
        """Log-probabilities of tokens as they count for their completions."""
        if self.ld_alpha is None:
            return logps
        counted = mask.astype(jnp.float32)
        lengths = per_example(counted, batch)
        shared = jnp.repeat(jnp.minimum(*pairs_of(lengths)), 2, axis=1)
        earlier = jnp.cumsum(lengths, axis=1) - lengths  # tokens of the examples before it in the row
        index = jnp.cumsum(counted, axis=1) - 1 - per_token(earlier, batch)
        return logps * ld_weights(index, per_token(shared, batch), self.ld_alpha)

    def _pair_loss(self, kind: str, pair: PairLogps, scores: TokenScores, batch: Batch) -> Float[Array, "B P"]:
        """One of the losses of each pair."""
        smoothed = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        if kind == "sft":
            return -pairs_of(per_example(scores.logps, batch))[0] * batch["sft_share"]
        if kind == "aot":
            return aot_loss(pair.chosen - pair.rejected, batch["aot_partners"], **smoothed)
        chosen, rejected = pair.chosen - pair.ref_chosen, pair.rejected - pair.ref_rejected
        if kind == "aot_unpaired":
            return aot_unpaired_loss(chosen, rejected, batch["aot_rejected"], batch["aot_chosen"], **smoothed)
        return pair_loss(
            kind,
            pair,
            **smoothed,
            discopop_tau=self.discopop_tau,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
        )

    def _partners(self, logps: Float[Array, "B S"], batch: Batch) -> Batch:
        """What each pair's values are compared with by the losses that sort them over the whole batch."""
        present = pairs_of(exists(batch))[0]
        (chosen, rejected), (ref_chosen, ref_rejected) = pairs_of(logps), pairs_of(batch["ref_logps"])
        found: Batch = {}
        if "aot" in self.loss_type:
            found["aot_partners"] = sorted_partners(chosen - rejected, ref_chosen - ref_rejected, present)
        if "aot_unpaired" in self.loss_type:
            of_chosen, of_rejected = chosen - ref_chosen, rejected - ref_rejected
            found["aot_rejected"] = sorted_partners(of_chosen, of_rejected, present)
            found["aot_chosen"] = sorted_partners(of_rejected, of_chosen, present)
        return found
