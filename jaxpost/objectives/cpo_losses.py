"""The losses of CPO, SimPO and AlphaPO, as functions of rewards; sources are those of `objectives.cpo`.

With d = r_w - r_l, S the logistic function and e the label smoothing:

    sigmoid   -(1 - e) log S(bd) - e log S(-bd)
    simpo     the same of bd - gamma
    hinge     max(0, 1 - bd)
    ipo       (d - 1/2b)^2
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxpost.objectives.dpo_losses import MAX_EXPONENT, smoothed_logistic


class Options(NamedTuple):
    """Hyperparameters of `cpo_loss`."""

    beta: float
    label_smoothing: float
    simpo_gamma: float


CPO_LOSSES: dict[str, Callable[[Array, Options], Array]] = {
    "sigmoid": lambda d, o: smoothed_logistic(o.beta * d, o.label_smoothing),
    "hinge": lambda d, o: jax.nn.relu(1 - o.beta * d),
    "ipo": lambda d, o: (d - 0.5 / o.beta) ** 2,
    "simpo": lambda d, o: smoothed_logistic(o.beta * d - o.simpo_gamma, o.label_smoothing),
}


def cpo_loss(
    loss_type: str,
    chosen: Float[Array, "*pairs"],
    rejected: Float[Array, "*pairs"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
) -> Float[Array, "*pairs"]:
    """One of CPO_LOSSES of each pair.

    Args:
        loss_type: its name.
        chosen, rejected: rewards: log-probabilities, which `ipo` and `simpo` take by token, or what `alpha_reward`
            makes of them.
        beta: above 0.
        label_smoothing: from 0 to below 1/2.
        simpo_gamma: the margin of `simpo`.
    """
    return CPO_LOSSES[loss_type](chosen - rejected, Options(beta, label_smoothing, simpo_gamma))


def alpha_reward(logps: Float[Array, "*pairs"], alpha: float) -> Float[Array, "*pairs"]:
    """AlphaPO's reward (1 - p^-alpha) / alpha of a log-probability; with alpha 0 the log-probability itself."""
    if alpha == 0:
        return logps
    return -jnp.expm1(jnp.minimum(-alpha * logps, MAX_EXPONENT)) / alpha
