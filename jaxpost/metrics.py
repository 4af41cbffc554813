"""What losses and metrics are returned as: sums that have not been divided yet, and extremes."""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
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


class Contrast(NamedTuple):
    """The difference of two means that have not been divided yet; 0 while either has no values.

    Attributes:
        total, count: of the one.
        other_total, other_count: of the other.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    other_total: Float[Array, ""]
    other_count: Float[Array, ""]

    def value(self) -> Float[Array, ""]:
        """The first mean less the second."""
        both = (self.count > 0) & (self.other_count > 0)
        means = Mean(self.total, self.count).value() - Mean(self.other_total, self.other_count).value()
        return jnp.where(both, means, 0.0)


class Variance(NamedTuple):
    """The mean square of deviations from the mean, not divided yet, so that it adds up exactly like a `Mean`.

    Attributes:
        total: sum of the values, each less a constant near them, which keeps digits.
        squares: sum of the squares of these.
        count: number of values.
    """

    total: Float[Array, ""]
    squares: Float[Array, ""]
    count: Float[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]

    def value(self) -> Float[Array, ""]:
        """The variance; 0 where nothing was counted."""
        mean, square = (Mean(part, self.count).value() for part in (self.total, self.squares))
        return square - mean * mean


def masked_variance(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *, around: float) -> Variance:
    """The Variance of `values` where `mask` is True; `around` is a constant near them."""
    off = jnp.where(mask, values.astype(jnp.float32) - around, 0.0)
    return Variance(jnp.sum(off), jnp.sum(off * off), jnp.sum(mask.astype(jnp.float32)))


class Least(NamedTuple):
    """The smallest value of a batch; infinite where there was none."""

    least: Float[Array, ""]


class Greatest(NamedTuple):
    """The largest value of a batch; minus infinite where there was none."""

    greatest: Float[Array, ""]


Metric = Mean | Contrast | Variance | Least | Greatest


def loss_of(metrics: Mapping[str, Metric]) -> Mean:
    """The loss among the metrics, which is always a mean."""
    loss = metrics["loss"]
    assert isinstance(loss, Mean)
    return loss


def least(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Least:
    """The smallest of `values` where `mask` is True."""
    return Least(jnp.min(jnp.where(mask, values.astype(jnp.float32), jnp.inf)))


def greatest(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Greatest:
    """The largest of `values` where `mask` is True."""
    return Greatest(jnp.max(jnp.where(mask, values.astype(jnp.float32), -jnp.inf)))


def over_parts(stacked: Mapping[str, Metric]) -> dict[str, Metric]:
    """The metrics of a batch from those of its parts, which are stacked along a leading axis."""
    reductions = {Mean: jnp.sum, Contrast: jnp.sum, Variance: jnp.sum, Least: jnp.min, Greatest: jnp.max}
    return {name: jax.tree.map(partial(reductions[type(metric)], axis=0), metric) for name, metric in stacked.items()}


class Tally:
    """Metrics of many batches on the host, by name: exact means, whatever the batches, and extremes."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._contrasts: dict[str, tuple[float, float, float, float]] = {}
        self._variances: dict[str, tuple[float, float, float]] = {}
        self._extremes: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Take in those of a batch, which are on the host."""
        for name, metric in metrics.items():
            if isinstance(metric, Mean):
                total, count = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (total + float(metric.total), count + float(metric.count))
            elif isinstance(metric, Contrast):
                sums = zip(self._contrasts.get(name, (0.0,) * 4), metric, strict=True)
                first, count, second, other_count = (total + float(part) for total, part in sums)
                self._contrasts[name] = first, count, second, other_count
            elif isinstance(metric, Variance):
                sums = zip(self._variances.get(name, (0.0,) * 3), metric, strict=True)
                total, squares, count = (sum_ + float(part) for sum_, part in sums)
                self._variances[name] = total, squares, count
            else:
                value, choose = float(metric[0]), min if isinstance(metric, Least) else max
                self._extremes[name] = choose(value, self._extremes.get(name, value))

    def values(self) -> dict[str, float]:
        """The means, 0 where nothing was counted, and the extremes."""
        means = {name: total / count if count else 0.0 for name, (total, count) in self._sums.items()}
        contrasts = {
            name: first / count - second / other_count if count and other_count else 0.0
            for name, (first, count, second, other_count) in self._contrasts.items()
        }
        variances = {
            name: squares / count - (total / count) ** 2 if count else 0.0
            for name, (total, squares, count) in self._variances.items()
        }
        return means | contrasts | variances | self._extremes

    def kept(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps of it, in JSON's types."""
        return [dict(part) for part in (self._sums, self._contrasts, self._variances, self._extremes)]

    def resume(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Go on from there."""
        for part, values in zip((self._sums, self._contrasts, self._variances, self._extremes), kept, strict=True):
            part |= values

    def clear(self) -> None:
        """Begin anew."""
        self._sums.clear()
        self._contrasts.clear()
        self._variances.clear()
        self._extremes.clear()


def wilson_interval(successes: int | float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share; Wilson, 1927, "Probable Inference, the Law of Succession"."""
    z, share = 1.959964, successes / count
    middle, spread = share + z * z / (2 * count), z * math.sqrt((share * (1 - share) + z * z / (4 * count)) / count)
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def normal_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of a mean of independent values, by the normal approximation; two at least."""
    mean, spread = statistics.fmean(values), 1.959964 * statistics.stdev(values) / math.sqrt(len(values))
    return mean - spread, mean + spread
