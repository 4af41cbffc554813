"""How much more frequent a point is in one set than in another: logistic regression that tells the two apart.

    p_1(x) / p_0(x) = P(1 | x) / P(0 | x) = exp(a x + b)    where either set counts as much as the other
    a, b = argmin  C sum_i w_i log(1 + exp(-s_i (a x_i + b))) + |a|^2 / 2,   s_i = +-1,  w_i = N / (2 N_of_its_set)

The objective is that of scikit-learn's LogisticRegression(C=1.0, class_weight="balanced"). The ratio is the importance
weight of Jung et al., 2024, "Binary Classifier Optimization for Large Language Model Alignment", arXiv:2404.04656, for
prompts of desirable and undesirable completions that are not distributed alike.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxpost.errors import ConfigError

STRENGTH = 1.0  # C
TOLERANCE = 1e-8  # of log-odds, which the last step changes by less; relative to the largest of them if that is above 1
MAX_STEPS = 200  # of Newton's method; a few are the rule
DECREASE = 1e-4  # share of the decrease that a step promises by the slope, which it must come to (Armijo)


class Classifier(NamedTuple):
    """a and b.

    Attributes:
        slope: float64 [E].
        intercept: of the log-odds at 0.
    """

    slope: np.ndarray
    intercept: float

    def log_odds(self, points: Float[np.ndarray, "N E"]) -> Float[np.ndarray, "N"]:
        """log P(1 | x) / P(0 | x)."""
        return points @ self.slope + self.intercept


def fit_classifier(points: Float[np.ndarray, "N E"], labels: Bool[np.ndarray, "N"]) -> Classifier:
    """The classifier of points that are in set 1 where the label is True, in float64.

    Raises:
        ConfigError: it is not found; the points are on a scale that numbers cannot hold.
    """
    points = points.astype(np.float64)
    # The slope is a sum of points, so that no more dimensions count than there are points.
    basis = np.linalg.qr(points.T)[0] if points.shape[1] > len(points) else np.eye(points.shape[1])
    inputs = np.append(points @ basis, np.ones((len(points), 1)), axis=1)
    penalty = np.append(np.full(basis.shape[1], 1 / STRENGTH), 0.0)
    signs = np.where(labels, 1.0, -1.0)
    weights = np.where(labels, 0.5 / np.sum(labels), 0.5 / np.sum(~labels)) * len(labels)

    def loss(theta: np.ndarray) -> float:
        return float(weights @ np.logaddexp(0, -signs * (inputs @ theta)) + penalty @ theta**2 / 2)

    theta = np.zeros(inputs.shape[1])
    for _ in range(MAX_STEPS):
        log_odds = inputs @ theta
        wrong = np.exp(-np.logaddexp(0, signs * log_odds))  # probability of the other set
        gradient = penalty * theta - inputs.T @ (weights * signs * wrong)
        curvature = (inputs.T * (weights * wrong * (1 - wrong))) @ inputs + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        size, before, promised = 1.0, loss(theta), DECREASE * float(gradient @ step)
        slack = 1e-12 * abs(before)  # near the end a decrease is less than what rounding changes
        while loss(theta - size * step) > before - size * promised + slack and size > 1e-9:
            size /= 2
        theta = theta - size * step
        if np.abs(inputs @ step).max() <= TOLERANCE * max(1.0, np.abs(log_odds).max()):
            return Classifier(basis @ theta[:-1], float(theta[-1]))
    raise ConfigError("no classifier tells desirable prompts from others by these embeddings; scale them down")


def density_ratio(log_odds: Float[np.ndarray, "N"], least: float, most: float) -> Float[np.ndarray, "N"]:
    """p_1 / p_0, clipped."""
    return np.maximum(np.exp(np.minimum(log_odds, np.log(most))), least)
