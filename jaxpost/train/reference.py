"""The model that a policy is compared with: how it is chosen, and how it may follow the policy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost.errors import ConfigError
from jaxpost.options import Group, option
from jaxpost.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Which model is the reference; TRL's names and defaults."""

    help_group = Group.REFERENCE

    ref_model_name_or_path: str | None = option(
        None,
        "The reference; by default what the policy starts from (of an adapter: with the adapter off).",
        may_change=True,
    )
    sync_ref_model: bool = option(False, "Move the reference towards the policy every ref_model_sync_steps (TR-DPO).")
    ref_model_mixup_alpha: float = option(0.6, "Share of the policy in the reference after a move; 1 replaces it.")
    ref_model_sync_steps: int = option(512, "Optimizer steps between such moves.")
    precompute_ref_log_probs: bool = option(
        False,
        "Ask the reference once, before the first step; the answers stay in tokenized_cache_dir.",
    )
    precompute_ref_batch_size: int | None = option(
        None,
        "Rows per data-parallel group that are asked together; per_device_train_batch_size by default.",
        may_change=True,
    )

    def __post_init__(self) -> None:
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ConfigError(f"ref_model_mixup_alpha is {self.ref_model_mixup_alpha}; it must be from 0 to 1")
        if self.ref_model_sync_steps < 1:
            raise ConfigError(f"ref_model_sync_steps is {self.ref_model_sync_steps}; it must be at least 1")
        if self.sync_ref_model and self.ref_model_name_or_path:
            raise ConfigError("sync_ref_model moves a copy of the policy's start; drop ref_model_name_or_path")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ConfigError("sync_ref_model moves the reference, precompute_ref_log_probs asks it once; drop one")
        if self.precompute_ref_batch_size is not None and self.precompute_ref_batch_size < 1:
            raise ConfigError(f"precompute_ref_batch_size is {self.precompute_ref_batch_size}; it must be at least 1")


class Reference(NamedTuple):
    """The model that a policy is compared with.

    Attributes:
        build: makes it of the policy and of arrays of its own.
        arrays: these, where they never change; None where it has none.
    """

    build: Callable[[Any, Any], Any]
    arrays: Any = None


def follow(config: ReferenceConfig, followed: Callable[[Any], Any]) -> Callable[[TrainState], Any]:
    """What the arrays of a reference that follows are after a step that has led to a state.

    `followed` gives, of the parameters, those that it is a copy of.

    Gorbatovski et al., 2024, "Learn Your Reference Model for Real Good Alignment", arXiv:2404.09656, equation 5.
    """
    share = config.ref_model_mixup_alpha

    def sync(state: TrainState) -> Any:
        due = state.step % config.ref_model_sync_steps == 0

        def mix(policy: jax.Array, reference: jax.Array) -> jax.Array:
            mixed = share * policy.astype(jnp.float32) + (1 - share) * reference.astype(jnp.float32)
            return jnp.where(due, mixed.astype(reference.dtype), reference)

        return jax.tree.map(mix, followed(state.params), state.reference)

    return sync
