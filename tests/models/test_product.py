import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost.models.config import Compute
from jaxpost.models.product import product
from jaxpost.sharding import make_mesh
from tests.conftest import make_model

ROUNDING = 2.0**-8  # of bfloat16, relative


def operands(turned=False, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    shapes = (40, 24), (16, 24) if turned else (24, 16), (40, 16)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def with_gradients(x, kernel, gradient, dtype=None, turned=False):
    y, pull = jax.vjp(lambda x, kernel: product(x, kernel, dtype, turned=turned), x, kernel)
    return y, *pull(gradient.astype(y.dtype))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_bfloat16_is_multiplied_as_exactly_as_it_is_stored(dtype, turned):
    x, kernel, gradient = operands(turned)
    y, of_x, of_kernel = with_gradients(x, kernel, gradient, dtype, turned)
    assert (y.dtype, of_x.dtype, of_kernel.dtype) == (dtype or jnp.bfloat16, jnp.bfloat16, jnp.bfloat16)
    x, kernel, gradient = (np.asarray(one, np.float64) for one in (x, kernel, gradient))
    flat = kernel.T if turned else kernel
    exact_of_kernel = gradient.T @ x if turned else x.T @ gradient
    for ours, exact in ((y, x @ flat), (of_x, gradient @ flat.T), (of_kernel, exact_of_kernel)):
        tolerance = 1e-6 if ours.dtype == jnp.float32 else ROUNDING
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("turned", [False, True])
def test_float32_is_what_matmul_gives(turned):
    x, kernel, gradient = operands(turned, jnp.float32)
    found = with_gradients(x, kernel, gradient, turned=turned)
    y, pull = jax.vjp(lambda x, kernel: jnp.matmul(x, kernel.T if turned else kernel), x, kernel)
    jax.tree.map(np.testing.assert_array_equal, found, (y, *pull(gradient)))


def test_operands_stay_bfloat16():
    """XLA on CPU would multiply them in float32 if the result were bfloat16, or the left matrix laid out by columns."""
    text = jax.jit(with_gradients).lower(*operands()).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    for line in products:
        operands_told, result = line.rsplit(":", 1)[1].split("->")
        assert operands_told.count("xbf16") == 2 and "xf32" in result
    assert text.count("LayoutConstraint") == 3


def test_a_mesh_changes_nothing():
    arrays, mesh = operands(), make_mesh("fsdp=4,tensor=2")
    alone = jax.jit(with_gradients)(*arrays)
    specs = P("fsdp"), P("fsdp", "tensor"), P("fsdp", "tensor")
    with jax.set_mesh(mesh):
        placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs, strict=True)]
        spread = jax.jit(with_gradients)(*placed)
    for one, other in zip(alone, spread, strict=True):
        one, other = (np.asarray(array, np.float32) for array in (one, other))
        np.testing.assert_allclose(one, other, rtol=ROUNDING, atol=ROUNDING)


def test_of_layers_only_their_inputs_are_stacked_in_bfloat16():
    """A stack of bfloat16 would be written anew, all of it, for each layer that is put in; one of integers is not."""
    model, tokens = make_model(), jnp.ones((3, 128), jnp.int32)
    model.compute = Compute(dtype="bfloat16", remat="dots")
    graphdef, state = nnx.split(model)
    _, pull = jax.vjp(lambda state: jnp.sum(nnx.merge(graphdef, state)(tokens)), state)
    stacks = [leaf for leaf in jax.tree.leaves(pull) if leaf.ndim > 2 and leaf.shape[0] == model.config.num_layers]
    narrow = [leaf.shape for leaf in stacks if leaf.dtype == jnp.bfloat16]
    assert narrow == [(model.config.num_layers, tokens.size, model.config.embed_dim)]
    assert sum(leaf.dtype == jnp.uint16 for leaf in stacks) == 7
