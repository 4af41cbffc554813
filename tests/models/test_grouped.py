"""The gradient of grouped products by the TPU's kernel, interpreted, against that of plain XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.models.grouped import _product


@pytest.mark.parametrize(
    ("sizes", "in_dim", "out_dim"),
    [([300, 0, 212, 88], 128, 256), ([5, 3, 0], 64, 16), ([512, 512], 1024, 640), ([0, 40], 640, 128)],
)
def test_gradients_are_those_of_xla(sizes, in_dim, out_dim):
    rng = np.random.default_rng(0)
    num_rows = sum(sizes) + 37  # some are in no group
    rows, of_out = (jnp.asarray(rng.normal(size=(num_rows, dim)), jnp.float32) for dim in (in_dim, out_dim))
    kernels = jnp.asarray(rng.normal(size=(len(sizes), in_dim, out_dim)), jnp.float32)
    ours = (jnp.arange(num_rows) < sum(sizes))[:, None]

    def total(product, rows, kernels):
        return jnp.sum(jnp.where(ours, product(jnp.where(ours, rows, 0), kernels, jnp.asarray(sizes)), 0) * of_out)

    expected = jax.grad(lambda *args: total(jax.lax.ragged_dot, *args), argnums=(0, 1))(rows, kernels)
    got = jax.grad(lambda *args: total(lambda *each: _product(True, *each), *args), argnums=(0, 1))(rows, kernels)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5, atol=1e-4)
