"""The optimizers' states: laid out on a mesh, the same from step to step, saved and restored."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost.models.config import Compute
from jaxpost.models.hf import place
from jaxpost.objectives.sft import SFT
from jaxpost.sharding import make_mesh, put, shardings
from jaxpost.train.checkpoint import Checkpoints
from jaxpost.train.checkpoint_config import CheckpointConfig
from jaxpost.train.optim import OPTIMIZERS
from jaxpost.train.state import TrainState, create_state
from jaxpost.train.step import make_step, updates_done
from tests.conftest import make_batch, make_model
from tests.train.test_optim import assert_close, make, make_tree, walk


# 8-bit: sums in another order differ in the last bit. Where that crosses the middle between two codes of the first
# moment, they are 1.4 % of the block's largest value apart, and the next update differs by 3 % of the learning rate.
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_eight_devices_equal_one_in_one_program(optim, tmp_path):
    mesh = make_mesh("fsdp=4,tensor=2")
    optimizer, params, grads = make(optim), make_tree(), [make_tree(seed) for seed in range(1, 4)]
    one, _ = walk(optimizer, params, grads)

    def step(params, state, grad):
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    layout = shardings(params, mesh), shardings(jax.eval_shape(optimizer.init, params), mesh)
    step = jax.jit(step, out_shardings=layout, donate_argnums=(0, 1))
    init = jax.jit(optimizer.init, out_shardings=layout[1])
    eight, state = jax.device_put(make_tree(), layout[0]), init(params)  # donated, so not `params`
    kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for grad in grads:
        eight, state = step(eight, state, jax.device_put(grad, layout[0]))
    assert_close(eight, one, atol=3e-5 if optim == "adamw_8bit" else 1e-6)
    assert step._cache_size() == 1
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == kinds
    # An eighth, but for small arrays and lora_b; of a factored moment, one dimension is left to split.
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert on_one < (0.5 if optim == "adafactor" else 0.2) * sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    steps = [jax.device_put(jnp.int32(number), NamedSharding(mesh, P())) for number in (3, 0)]
    saved = TrainState(steps[0], eight, {}, state)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(saved, 3, {}, {})
    fresh = TrainState(steps[1], jax.device_put(params, layout[0]), {}, init(params))
    with Checkpoints(tmp_path, CheckpointConfig(resume_from_checkpoint="true")) as checkpoints:
        found = checkpoints.restore(fresh)
    assert found is not None
    restored = found.state
    assert_close(restored.opt_state, state, rtol=0)
    assert int(updates_done(restored)) == 3


def test_factored_and_scaled_moments_lie_with_their_parameters():
    mesh = make_mesh("fsdp=4,tensor=2")

    def specs(optim):
        state = shardings(jax.eval_shape(make(optim).init, make_tree()), mesh)[0]
        return jax.tree.map(lambda sharding: sharding.spec, state)

    adafactor, blocks = specs("adafactor"), specs("adamw_8bit")
    assert adafactor.row["layers"]["mlp"]["up"]["kernel"] == P(None, "fsdp", None)
    assert adafactor.column["layers"]["mlp"]["up"]["kernel"] == P(None, None, "tensor")
    assert adafactor.row["layers"]["mlp"]["up"]["bias"] == P(None, "tensor")
    assert blocks.nu["layers"]["mlp"]["up"]["kernel"] == P(None, "fsdp", "tensor")
    assert blocks.nu_scale["layers"]["mlp"]["up"]["kernel"] == P(None, "fsdp", "tensor")  # 4 blocks on 2 devices
    assert blocks.nu_scale["layers"]["mlp"]["down"]["kernel"] == P(None, "tensor", None)  # 2 blocks on 4


@pytest.mark.parametrize("optim", ["adamw_8bit", "muon"])
def test_the_step_takes_it_and_compiles_once(optim):
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer, model = make(optim), make_model(intermediate_size=128)  # 32 x 128 is coded
    with jax.set_mesh(mesh):
        graphdef, state = create_state(place(model, Compute(), mesh), optimizer, nnx.Param, mesh)
        step = make_step(SFT(), graphdef, state, optimizer, lambda _: 1e-3, max_grad_norm=1.0, num_micro_batches=1)
        assert (optim == "adamw_8bit") == any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(state.opt_state))
        losses = []
        for _ in range(3):
            state, report = step(state, put(make_batch(), mesh))
            losses.append(float(report.metrics["loss"].value()))
    assert step._cache_size() == 1
    assert losses[2] < losses[1] < losses[0]
