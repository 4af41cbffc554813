import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxpost.errors import ConfigError
from jaxpost.sharding import batch_groups, constrain, make_mesh, mesh_axes, parameter_spec, put, shardings
from tests.conftest import make_batch, make_noisy_model


def sizes(spec=None):
    return {axis: size for axis, size in make_mesh(spec).shape.items() if size > 1}


def test_default_mesh_puts_every_device_on_fsdp():
    assert sizes() == {"fsdp": 8}
    assert make_mesh().axis_names == ("data", "fsdp", "expert", "context", "tensor")


def test_minus_one_takes_what_is_left():
    assert sizes("fsdp=-1,tensor=2") == {"fsdp": 4, "tensor": 2}
    assert sizes(" expert = 2, fsdp=-1,tensor=4 ") == {"expert": 2, "tensor": 4}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fsdp=3", "needs 3 devices, here are 8"),
        ("fsdp=4,tensor=4", "needs 16 devices, here are 8"),
        ("expert=99999999", "needs 99999999 devices"),
        ("fdsp=8", "did you mean 'fsdp'"),
        ("experts=8", "did you mean 'expert'"),
        ("rows=8", "axes are data, fsdp, expert, context, tensor"),
        ("8", "unknown axis '8'"),
        ("fsdp=8,", "unknown axis ''"),
        ("fsdp", "must be a positive number or -1, not ''"),
        ("fsdp=x", "must be a positive number"),
        ("fsdp=0", "must be a positive number"),
        ("fsdp=-2", "must be a positive number"),
        ("fsdp=--8", "must be a positive number"),
        ("fsdp=8.0", "must be a positive number"),
        ("fsdp=²", "must be a positive number"),
        ("fsdp=4:tensor=2", "not '4:tensor=2'"),
        ("fsdp=2,fsdp=4", "fsdp is given twice"),
        ("fsdp=-1,data=-1", "only one axis"),
        ("tensor=16,fsdp=-1", "needs a multiple of 16 devices, here are 8"),
        ("tensor=3,fsdp=-1", "needs a multiple of 3 devices, here are 8"),
    ],
)
def test_bad_meshes_are_named(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_mesh(spec)
    assert f"--mesh {spec}" in str(caught.value) and "\n" not in str(caught.value)


def test_table_covers_stacked_parameters_and_moments():
    mesh = make_mesh("fsdp=4,tensor=2")
    assert parameter_spec("layers.attention.query.kernel", (2, 32, 64), mesh) == P(None, "fsdp", "tensor")
    assert parameter_spec("0.mu.layers.mlp.down.kernel", (2, 64, 32), mesh) == P(None, "tensor", "fsdp")
    assert parameter_spec("0.count", (), mesh) == P()


def test_the_expert_axis_splits_experts_and_is_one_more_of_fsdp_to_the_rest():
    mesh = make_mesh("fsdp=2,expert=2,tensor=2")
    both = ("fsdp", "expert")
    assert batch_groups(mesh) == 4
    assert parameter_spec("layers.attention.query.kernel", (2, 32, 64), mesh) == P(None, both, "tensor")
    assert parameter_spec("layers.mlp.router.kernel", (2, 32, 8), mesh) == P(None, both, None)
    experts = "layers.mlp.experts"
    assert parameter_spec(f"{experts}.up.kernel", (2, 8, 32, 64), mesh) == P(None, "expert", "fsdp", "tensor")
    assert parameter_spec(f"0.mu.{experts}.down.kernel", (2, 8, 64, 32), mesh) == P(None, "expert", "tensor", "fsdp")
    assert parameter_spec(f"{experts}.up.adapter.lora_a", (2, 8, 32, 4), mesh) == P(None, "expert", "fsdp", None)
    assert parameter_spec(f"{experts}.up.adapter.lora_b", (2, 8, 4, 64), mesh) == P(None, "expert", None, "tensor")
    assert parameter_spec(f"{experts}.up.adapter.scale", (2,), mesh) == P(None)  # of layers
    codes = parameter_spec(f"{experts}.up.kernel.codes", (2, 8, 4, 32, 64), mesh)
    assert codes == P(None, "expert", "fsdp", None, "tensor")
    assert parameter_spec(f"{experts}.up.kernel.scale", (2, 8, 64), mesh) == P(None, "expert", "tensor")


def log_of(caplog, path, shape, mesh):
    caplog.clear()
    with caplog.at_level(logging.INFO, "jaxpost"):
        spec = parameter_spec(path, shape, make_mesh(mesh))
    return spec, [record.getMessage() for record in caplog.records]


def test_indivisible_dimension_is_split_over_the_part_that_divides_it(caplog):
    spec, log = log_of(caplog, "head.kernel", (30, 321), "fsdp=4,tensor=2")
    assert spec == P(None, None)
    assert log == [
        "head.kernel: 30 is not a multiple of fsdp=4, replicated",
        "head.kernel: 321 is not a multiple of tensor=2, replicated",
    ]
    spec, log = log_of(caplog, "head.kernel", (12, 64), "fsdp=2,expert=4")
    assert spec == P("expert", None)
    assert log == ["head.kernel: 12 is not a multiple of fsdp=2 x expert=4, split over expert=4 alone"]
    spec, log = log_of(caplog, "layers.mlp.experts.gate.kernel", (2, 6, 32, 64), "fsdp=2,expert=4")
    assert spec == P(None, None, ("fsdp", "expert"), None)
    assert log == ["layers.mlp.experts.gate.kernel: 6 is not a multiple of expert=4, replicated"]
    assert log_of(caplog, "0.nu.layers.mlp.up.kernel", (2, 1, 64), "fsdp=8") == (P(None, None, None), [])


def test_unknown_parameter_is_an_error():
    with pytest.raises(ConfigError, match=r"layers\.mystery"):
        parameter_spec("layers.mystery", (2, 3), make_mesh())


def test_put_splits_rows_and_constrain_needs_no_mesh():
    mesh = make_mesh("fsdp=2,expert=2,tensor=2")
    batch = put({"tokens": np.arange(16).reshape(8, 2)}, mesh)
    assert batch["tokens"].sharding.spec == P(("data", "fsdp", "expert"))
    assert batch["tokens"].addressable_shards[0].data.shape == (2, 2)
    assert constrain(jnp.ones((2, 2)), "batch", None).shape == (2, 2)
    with jax.set_mesh(mesh):
        assert constrain(jnp.ones((3, 2)), "batch", None).shape == (3, 2)
    assert [mesh_axes("batch", rows, mesh) for rows in (8, 6, 3)] == [("fsdp", "expert"), ("fsdp",), ()]


@pytest.mark.parametrize(
    ("mesh", "rows", "changes"),
    [
        ("tensor=8", 2, {}),  # each key head on four devices
        ("fsdp=2,tensor=4", 4, {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6}),
        ("data=8", 3, {}),  # rows that all devices have
        ("fsdp=8", 8, {"hidden_size": 36, "intermediate_size": 44}),
    ],
)
def test_a_model_that_the_mesh_does_not_divide_computes_the_same(mesh, rows, changes):
    model, mesh = make_noisy_model(0, **changes), make_mesh(mesh)
    batch = {name: jnp.asarray(column) for name, column in make_batch(rows).items() if name != "loss_mask"}
    graphdef, weights = nnx.split(model)
    weights = nnx.to_pure_dict(weights)

    def total(weights, batch):
        h, _ = nnx.merge(graphdef, weights).hidden(**batch)
        return jnp.sum(jnp.sin(h) ** 2 * (batch["segments"] > 0)[..., None])  # nothing cancels

    one = jax.jit(jax.value_and_grad(total))(weights, batch)
    with jax.set_mesh(mesh):
        many = jax.jit(jax.value_and_grad(total))(jax.device_put(weights, shardings(weights, mesh)), batch)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


class Chip:
    """A device of a TPU slice, as far as a mesh asks."""

    platform, device_kind, core_on_chip, process_index = "tpu", "TPU v5p", 0, 0

    def __init__(self, number, coords):
        self.id, self.coords = number, coords

    def __repr__(self):
        return str(self.coords)


@pytest.mark.parametrize(
    "spec", ["fsdp=64", "fsdp=8,tensor=8", "fsdp=-1,context=8", "data=2,fsdp=2,context=8,tensor=2"]
)
def test_an_axis_may_be_a_part_of_the_torus(spec):
    chips = [Chip(i, (i % 4, i // 4 % 4, i // 16)) for i in range(64)]
    mesh = make_mesh(spec, chips)
    assert mesh.size == 64 and len({chip.id for chip in mesh.devices.flat}) == 64
