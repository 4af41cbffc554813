"""The weights of attention on CPU against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.models.softmax import LEAST, exp, total


@pytest.mark.parametrize("jit", [False, True])
def test_the_exponential_is_right_to_two_units_in_the_last_place(jit):
    x = np.concatenate([np.linspace(LEAST, 88, 200_001), np.linspace(-1, 1, 10_001)]).astype(np.float32)
    ours = np.asarray((jax.jit(exp) if jit else exp)(jnp.asarray(x)))
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(ours - exact) / np.spacing(exact.astype(np.float32))) <= 2


def test_what_is_masked_has_no_weight_and_what_is_wrong_stays_so():
    x = jnp.asarray([-1e30, -jnp.inf, np.nextafter(np.float32(LEAST), np.float32(-100)), 0.0, jnp.nan])
    np.testing.assert_array_equal(exp(x), [0, 0, 0, 1, np.nan])


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 4, 300)])
def test_the_total_is_the_sum(shape):
    weights = np.random.default_rng(0).random(shape).astype(np.float32)
    expected = weights.astype(np.float64).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(total(jnp.asarray(weights)), expected, rtol=1e-6)
