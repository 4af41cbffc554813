"""`Mean(total, count)`: the only thing that losses and metrics return."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


class Mean(NamedTuple):
    """A mean that has not been divided yet, so that it adds up exactly over micro-batches and devices.

    Attributes:
        total: sum of the values, a float32 scalar.
        count: number of values (tokens, rows or pairs) in the sum, a float32 scalar.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]

    def value(self) -> Float[Array, ""]:
        """The mean; 0 where nothing was counted."""
        return jnp.where(self.count > 0, self.total / jnp.maximum(self.count, 1), 0.0)


def masked_mean(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Mean:
    """The Mean of `values` where `mask` is True; elsewhere a value never counts, not even if it is NaN."""
    return Mean(jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0)), jnp.sum(mask.astype(jnp.float32)))
