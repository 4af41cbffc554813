import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxpost.errors import ConfigError
from jaxpost.sharding import constrain, make_mesh, parameter_spec, put


def test_default_mesh_puts_every_device_on_fsdp():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}


def test_minus_one_takes_what_is_left():
    assert dict(make_mesh("fsdp=-1,tensor=2").shape) == {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fsdp=3", "needs 3 devices, here are 8"),
        ("fdsp=8", "did you mean 'fsdp'"),
        ("fsdp=x", "must be a positive number"),
        ("fsdp=-1,data=-1", "only one axis"),
        ("tensor=16,fsdp=-1", "needs"),
    ],
)
def test_bad_meshes_are_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(spec)


def test_table_covers_stacked_parameters_and_moments():
    mesh = make_mesh("fsdp=4,tensor=2")
    assert parameter_spec("layers.attention.query.kernel", (2, 32, 64), mesh) == P(None, "fsdp", "tensor")
    assert parameter_spec("0.mu.layers.mlp.down.kernel", (2, 64, 32), mesh) == P(None, "tensor", "fsdp")
    assert parameter_spec("0.count", (), mesh) == P()


def test_indivisible_dimension_is_replicated():
    assert parameter_spec("head.kernel", (30, 321), make_mesh("fsdp=4,tensor=2")) == P(None, None)


def test_unknown_parameter_is_an_error():
    with pytest.raises(ConfigError, match=r"layers\.mystery"):
        parameter_spec("layers.mystery", (2, 3), make_mesh())


def test_put_splits_rows_and_constrain_needs_no_mesh():
    mesh = make_mesh("fsdp=4,tensor=2")
    batch = put({"tokens": np.arange(16).reshape(8, 2)}, mesh)
    assert batch["tokens"].sharding.spec == P(("data", "fsdp"))
    assert batch["tokens"].addressable_shards[0].data.shape == (2, 2)
    assert constrain(jnp.ones((2, 2)), "batch", None).shape == (2, 2)
    with jax.set_mesh(mesh):
        assert constrain(jnp.ones((3, 2)), "batch", None).shape == (3, 2)
