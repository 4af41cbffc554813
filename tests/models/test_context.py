"""Rows in slices: what the devices send each other, and that the model reads and decodes as on one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost.models.attention import attention
from jaxpost.models.config import Compute
from jaxpost.models.context import to_heads, to_tokens
from jaxpost.models.hf import place
from jaxpost.models.views import Places
from jaxpost.rl.generate import generate
from jaxpost.rl.sampling import Sampling
from jaxpost.rl.slots import Programs
from jaxpost.sharding import TOKEN_AXES, make_mesh
from tests.conftest import make_batch, make_noisy_model

MESHES = ["fsdp=2,context=4", "context=2,tensor=2,data=2"]


@pytest.mark.parametrize("spec", MESHES)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_only_slices_of_rows_move(spec, kv_heads):
    mesh, batch = make_mesh(spec), make_batch(rows=4, length=32)
    places = Places(jnp.asarray(batch["positions"]), jnp.asarray(batch["segments"]))
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(128, heads, 16)), jnp.float32) for heads in (4, kv_heads, kv_heads)
    )

    def attended(query, key, value):
        parts = (x.reshape(4, 32, *x.shape[1:]) for x in to_heads(query, key, value))
        return to_tokens(attention(*parts, places, scale=0.25).reshape(128, 4, 16))

    expected = attended(query, key, value)
    with jax.set_mesh(mesh):
        inputs = [jax.device_put(x, NamedSharding(mesh, P(TOKEN_AXES))) for x in (query, key, value)]
        program = jax.jit(attended).lower(*inputs).compile()
        out = program(*inputs)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert out.sharding.shard_shape(out.shape)[0] == 128 * mesh.shape["tensor"] // 8
    text = program.as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)
    assert "all-to-all" in text
    assert not [shape for shape in gathered if np.prod([*map(int, shape.split(","))]) >= 32 * 16], gathered


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("spec", MESHES)
def test_completions_are_those_of_one_device(spec, gather):
    prompts = [np.arange(3, 3 + length) for length in (5, 9, 17, 2)]
    options = {"max_new_tokens": 12, "eos_ids": [1], "num_return_sequences": 2, "batch_size": 8}
    expected = generate(make_noisy_model(0), prompts, **options)
    mesh = make_mesh(spec)
    model = place(make_noisy_model(0), Compute(), mesh)
    with jax.set_mesh(mesh):
        completions = generate(model, prompts, **options, gather=gather)
    assert [c.tokens for c in completions] == [c.tokens for c in expected]
    for ours, theirs in zip(completions, expected, strict=True):
        np.testing.assert_allclose(ours.logps, theirs.logps, atol=1e-5)


@pytest.mark.parametrize(("gather", "expected"), [(True, False), (False, True)])
def test_weights_that_are_at_hand_are_not_gathered_at_every_token(gather, expected):
    mesh = make_mesh("fsdp=4,tensor=2")
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(place(make_noisy_model(0), Compute(), mesh))
        weights = nnx.to_pure_dict(state)
        compiled = Programs(graphdef, 16, 64, gather)
        arguments = compiled.empty(weights, 8), np.asarray([1], np.int32), Sampling(), 0, 8, 4
        text = compiled.decode.lower(*compiled.near(weights), *arguments).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)
    kernel = 32 * 64 // 2  # numbers of one, of the MLP
    assert any(np.prod([*map(int, shape.split(","))]) >= kernel for shape in gathered) == expected


def test_slices_that_do_not_divide_the_heads_are_not_split(caplog):
    mesh, batch = make_mesh("context=8"), make_batch(rows=2, length=32)
    model = make_noisy_model(0)
    expected, _ = model.hidden(*(jnp.asarray(batch[name]) for name in ("tokens", "positions", "segments")))
    with jax.set_mesh(mesh), caplog.at_level("INFO", logger="jaxpost"):
        placed = place(make_noisy_model(0), Compute(), mesh)
        h, _ = jax.jit(placed.hidden)(*(jnp.asarray(batch[name]) for name in ("tokens", "positions", "segments")))
    np.testing.assert_allclose(h, expected, atol=1e-5)
    assert "attention, heads of queries: 4 is not a multiple of context=8" in caplog.text
