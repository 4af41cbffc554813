"""Logistic regression that tells two sets of points apart, and the ratio that follows."""

import numpy as np
import pytest

from jaxpost.objectives.density_ratio import density_ratio, fit_classifier


def points_of(count, size, scale=1.0, apart=0.5, seed=0):
    """Points of two sets, the second of which is smaller and lies elsewhere."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) < count // 3
    return scale * (rng.normal(size=(count, size)) + apart * labels[:, None]), labels


CASES = [(40, 3, 1.0, 0.5), (30, 80, 1.0, 0.1), (200, 5, 1e-3, 0.0), (100, 4, 1e3, 1.0), (20, 2, 1.0, 9.0)]


@pytest.mark.parametrize(("count", "size", "scale", "apart"), CASES)
def test_the_gradient_of_what_is_minimised_is_zero(count, size, scale, apart):
    points, labels = points_of(count, size, scale, apart)
    found = fit_classifier(points, labels)
    weights = np.where(labels, count / (2 * labels.sum()), count / (2 * (~labels).sum()))
    too_high = weights * (1 / (1 + np.exp(-found.log_odds(points))) - labels)
    np.testing.assert_allclose(points.T @ too_high + found.slope, 0, atol=1e-8 * max(1, scale))
    np.testing.assert_allclose(too_high.sum(), 0, atol=1e-8)


@pytest.mark.parity
@pytest.mark.parametrize(("count", "size", "scale", "apart"), CASES)
def test_the_classifier_is_that_of_scikit_learn(count, size, scale, apart):
    linear_model = pytest.importorskip("sklearn.linear_model")
    points, labels = points_of(count, size, scale, apart)
    options = {"class_weight": "balanced", "solver": "newton-cholesky", "tol": 1e-12, "max_iter": 1000}
    theirs = linear_model.LogisticRegression(**options).fit(points, labels)
    expected = theirs.decision_function(points)
    np.testing.assert_allclose(fit_classifier(points, labels).log_odds(points), expected, rtol=1e-6, atol=1e-8)


def test_points_that_are_alike_are_as_frequent_in_either_set():
    points, labels = np.full((9, 2), 3.0), np.arange(9) < 2
    np.testing.assert_allclose(density_ratio(fit_classifier(points, labels).log_odds(points), 0.5, 10.0), 1, rtol=1e-8)


def test_the_ratio_is_clipped_and_never_overflows():
    ratios = density_ratio(np.array([-1e4, -0.1, 0.0, np.log(3.0), 1e4]), 0.5, 10.0)
    np.testing.assert_allclose(ratios, [0.5, np.exp(-0.1), 1, 3, 10])
