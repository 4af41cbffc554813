"""The kernels for GPUs, their steps run one by one, against scores written out and against plain XLA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.models import attention as module
from jaxpost.models.attention import RESIDUALS, attention
from jaxpost.models.flash import flash
from jaxpost.models.tiles import BLOCK
from jaxpost.sharding import make_mesh
from tests.models.test_attention import branching, inputs, written_out


@pytest.fixture
def gpu(monkeypatch):
    """`attention` with the kernels for GPUs."""
    interpreted = partial(flash, residuals=RESIDUALS, interpret=True)
    return partial(monkeypatch.setitem, module.KERNELS, "xla", interpreted)


def gradients(kernel, arrays, real):
    weight = jnp.cos(jnp.arange(arrays[0].size)).reshape(arrays[0].shape)

    def total(arrays):
        out = jnp.where(real, kernel(*arrays), 0.0)
        return jnp.sum(out * weight), out

    return jax.jit(jax.grad(total, has_aux=True))(arrays)


@pytest.mark.parametrize(
    ("documents", "window", "softcap", "dim", "mesh"),
    [
        (1, None, None, 16, None),
        (5, None, None, 24, None),
        (2, 5, 0.7, 16, None),
        (1, BLOCK + 3, None, 16, None),
        (3, None, None, 16, "data=2,fsdp=2,tensor=2"),
    ],
)
def test_equals_scores_written_out(gpu, documents, window, softcap, dim, mesh):
    arrays, places = inputs(BLOCK + 44, documents, rows=4 if mesh else 2, heads=4, kv_heads=2, dim=dim)
    real = (places.segments > 0)[..., None, None]
    expected, expected_out = gradients(lambda *x: written_out(*x, places, 0.3, window, softcap), arrays, real)
    gpu()
    traced = None if window is None else jnp.asarray(window)
    with jax.set_mesh(make_mesh(mesh, None if mesh else jax.devices()[:1])):
        mine, out = gradients(lambda *x: attention(*x, places, scale=0.3, window=traced, softcap=softcap), arrays, real)
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    for a, b in zip(mine, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("window", [None, 70])
def test_branches_are_those_of_the_tiled_kernel(gpu, window):
    places, _ = branching(BLOCK + 5, [(BLOCK, 30), (20, 90), (BLOCK + 5, 3), (1, 100)])
    arrays, _ = inputs(places.positions.shape[1], 1, rows=1)
    limit = None if window is None else jnp.asarray(window)
    run = lambda *x: attention(*x, places, scale=0.3, window=limit)  # noqa: E731
    expected, expected_out = gradients(run, arrays, True)
    gpu()
    mine, out = gradients(lambda *x: run(*x), arrays, True)
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    for a, b in zip(mine, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_other_documents_are_not_even_read(gpu):
    """Of a row whose neighbour in the batch needs them."""
    arrays, _ = inputs(2 * BLOCK, 1, rows=2)
    order = jnp.arange(2 * BLOCK)
    one, two = jnp.ones(2 * BLOCK, jnp.int32), 1 + (order >= BLOCK)
    positions = jnp.stack([order, jnp.where(order < BLOCK, order, order - BLOCK)])
    places = module.Places(positions, jnp.stack([one, two]))
    query, key, value = arrays
    value = jnp.where((order < BLOCK)[:, None, None], jnp.nan, value)
    gpu()
    out = attention(query, key, value, places, scale=0.3)
    assert np.all(np.isnan(out[0])) and np.all(np.isnan(out[1, :BLOCK]))
    assert np.all(np.isfinite(out[1, BLOCK:]))
