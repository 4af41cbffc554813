"""Grouped products by the kernels for TPUs and GPUs, interpreted, against those of plain XLA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.models import grouped_triton
from jaxpost.models.grouped import _product


@pytest.mark.parametrize(
    "product", [partial(_product, interpret=True), partial(grouped_triton.product, interpret=True)]
)
@pytest.mark.parametrize(
    ("sizes", "in_dim", "out_dim"),
    [([300, 0, 212, 88], 128, 256), ([5, 3, 0], 64, 16), ([512, 512], 1024, 640), ([0, 40], 640, 128)],
)
def test_results_and_gradients_are_those_of_xla(product, sizes, in_dim, out_dim):
    rng = np.random.default_rng(0)
    num_rows = sum(sizes) + 37  # some are in no group
    rows, of_out = (jnp.asarray(rng.normal(size=(num_rows, dim)), jnp.float32) for dim in (in_dim, out_dim))
    kernels = jnp.asarray(rng.normal(size=(len(sizes), in_dim, out_dim)), jnp.float32)
    ours = (jnp.arange(num_rows) < sum(sizes))[:, None]

    def total(product, rows, kernels):
        out = jnp.where(ours, product(jnp.where(ours, rows, 0), kernels, jnp.asarray(sizes)), 0)
        return jnp.sum(out * of_out), out

    run = partial(jax.grad, argnums=(1, 2), has_aux=True)(total)
    (expected, expected_out), (got, out) = run(jax.lax.ragged_dot, rows, kernels), run(product, rows, kernels)
    for a, b in zip((out, *got), (expected_out, *expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)
