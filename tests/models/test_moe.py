"""The mixture of experts against a loop over tokens and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpost.models.families import read_config
from jaxpost.models.moe import MoE, Routing, balance_loss, balance_terms
from jaxpost.sharding import make_mesh, shardings
from tests.conftest import TINY_LLAMA

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {"model_type": "qwen2_moe", **EXPERTS, "shared_expert_intermediate_size": 20}


def make_moe(**changes):
    fields = {name: value for name, value in TINY_LLAMA.items() if not name.endswith("_bias")}
    config = read_config({**fields, "model_type": "qwen3_moe", **EXPERTS, **changes}, "tiny")
    moe = MoE(config, rngs=nnx.Rngs(0))
    return jax.tree.map(lambda leaf: leaf * 10, moe)  # far enough from 0 for routers to prefer someone


def written_out(moe, x):
    """Token by token, expert by expert."""
    probabilities = jax.nn.softmax(x @ moe.router.kernel[...])
    rows = []
    for token, probability in zip(x, probabilities, strict=True):
        best = jnp.argsort(-probability)[: moe.config.num_per_token]
        weights = probability[best] / (probability[best].sum() if moe.config.normalize else 1.0)
        gate, up, down = (part.kernel[...] for part in (moe.experts.gate, moe.experts.up, moe.experts.down))
        outs = [(jax.nn.silu(token @ gate[e]) * (token @ up[e])) @ down[e] for e in best]
        row = sum(weight * out for weight, out in zip(weights, outs, strict=True))
        if moe.shared is not None:
            row += jax.nn.sigmoid(token @ moe.shared_share.kernel[...]) * moe.shared(token[None])[0]
        rows.append(row)
    return jnp.stack(rows)


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": True}, SHARED], ids=["plain", "normalized", "shared"])
def test_equals_the_loop(changes):
    moe = make_moe(**changes)
    x = jax.random.normal(jax.random.key(1), (7, 32))
    weight = jnp.cos(jnp.arange(x.size)).reshape(x.shape)
    mine = nnx.grad(lambda moe: jnp.sum(moe(x)[0] * weight))(moe)
    expected = nnx.grad(lambda moe: jnp.sum(written_out(moe, x) * weight))(moe)
    np.testing.assert_allclose(moe(x)[0], written_out(moe, x), atol=1e-5)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(mine))


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"])
def test_many_devices_are_one(mesh):
    moe, x = make_moe(**SHARED), jax.random.normal(jax.random.key(1), (16, 32))
    graphdef, weights = nnx.split(moe)
    weights, mesh = nnx.to_pure_dict(weights), make_mesh(mesh)

    def loss(weights, x):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, weights)(x)[0]))

    one = jax.value_and_grad(loss)(weights, x)
    with jax.set_mesh(mesh):
        many = jax.jit(jax.value_and_grad(loss))(jax.device_put(weights, shardings({"mlp": weights}, mesh)["mlp"]), x)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_balance_is_one_where_all_experts_are_used_alike_and_grows_with_the_preference_for_one():
    def balance(probabilities, chosen, real):
        visits, mass = balance_terms(Routing(jnp.asarray(probabilities), jnp.asarray(chosen)), jnp.asarray(real))
        return float(balance_loss(visits[None], mass[None], jnp.sum(jnp.asarray(real))))

    assert balance([[0.5, 0.5]] * 2, [[0], [1]], [True, True]) == pytest.approx(1.0)
    assert balance([[0.9, 0.1]] * 2, [[0], [0]], [True, True]) == pytest.approx(1.8)
    assert balance([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]], [[0], [1], [0]], [True, True, False]) == pytest.approx(1.0)
    assert balance([[0.9, 0.1]], [[0]], [False]) == 0.0
