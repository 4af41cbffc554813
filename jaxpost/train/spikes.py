"""Gradients that are far larger than those before: their steps can be left out.

A broken batch makes one, and its step can undo hours. As in Levanter's SkipStep, a norm is compared with the mean and
the deviation of the norms before it; here these fade, so that a run gets used to norms that stay large.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxpost.errors import ConfigError
from jaxpost.options import Group, option

KEPT = 0.98  # what a norm counts after another step
LEAST_SEEN = 20  # norms before any is called a spike


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """Which steps are left out."""

    help_group = Group.OPTIMISATION

    skip_spikes: float | None = option(
        None,
        "Leave out a step whose gradient norm is above the mean of those before by so many deviations (6, say).",
    )

    def __post_init__(self) -> None:
        if self.skip_spikes is not None and not self.skip_spikes > 0:
            raise ConfigError(f"skip_spikes is {self.skip_spikes}; it must be above 0, or null for none")


def no_norms() -> dict[str, Array]:
    """What is known of the norms before the first step."""
    return {name: jnp.zeros(()) for name in ("seen", "weight", "total", "squares")}


def judged(norms: dict[str, Array], norm: Array, finite: Array, limit: float | None) -> tuple[Array, dict[str, Array]]:
    """Whether the norm of a gradient is a spike, and what is known of norms then.

    A spike counts as the greatest norm that is none; a gradient that is not `finite` does not count. Without a limit
    there are no spikes.
    """
    if limit is None:
        return jnp.zeros((), bool), norms
    weight = jnp.maximum(norms["weight"], 1e-6)
    mean = norms["total"] / weight
    deviation = jnp.sqrt(jnp.maximum(norms["squares"] / weight - mean * mean, 1e-6 * mean * mean))
    most = mean + limit * deviation
    is_spike = finite & (norms["seen"] >= LEAST_SEEN) & (norm > most)
    value = jnp.where(is_spike, most, norm)
    added = {"weight": 1.0, "total": value, "squares": value * value}
    known = {"seen": norms["seen"] + 1} | {name: KEPT * norms[name] + new for name, new in added.items()}
    return is_spike, {name: jnp.where(finite, known[name], old) for name, old in norms.items()}
