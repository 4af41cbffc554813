"""The mixture of experts against a loop over tokens and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxpost import from_pretrained, save_pretrained
from jaxpost.errors import ConfigError
from jaxpost.models.families import read_config
from jaxpost.models.lora import LoRA
from jaxpost.models.moe import MoE, Routing, balance_loss, balance_terms
from jaxpost.sharding import make_mesh, shardings
from tests.conftest import TINY_LLAMA, make_noisy_model

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


def with_adapters(moe):
    """Low-rank updates of all experts, of the shapes that `attach` gives them but for the layers."""
    for number, part in enumerate((moe.experts.gate, moe.experts.up, moe.experts.down)):
        experts, inputs, outputs = part.kernel.shape
        a, b = (
            jax.random.normal(jax.random.key(2 * number + i), (experts, *shape)) * 0.3
            for i, shape in enumerate([(inputs, 3), (3, outputs)])
        )
        part.adapter = LoRA({"lora_a": a, "lora_b": b, "scale": jnp.float32(0.5)}, (3,))
    return moe


EIGHT = {**SHARED, "num_experts": 8}
MESHES = [
    ("fsdp=8", SHARED, 16),
    ("data=2,fsdp=2,tensor=2", SHARED, 16),
    ("fsdp=2,expert=4", EIGHT, 16),
    ("expert=2,tensor=2,fsdp=2", EIGHT, 16),
    ("data=2,expert=2,tensor=2", SHARED, 16),
    ("expert=8", EIGHT, 16),
    ("fsdp=2,expert=4", SHARED, 16),  # 6 experts on 4: all on each
    ("fsdp=2,expert=4", EIGHT, 6),  # rows for 2 groups
    ("expert=4,tensor=2", EIGHT, 5),  # rows that all devices have
]


@pytest.mark.parametrize(("mesh", "changes", "rows"), MESHES)
def test_many_devices_are_one(mesh, changes, rows):
    moe, x = with_adapters(make_moe(**changes)), jax.random.normal(jax.random.key(1), (rows, 32))
    graphdef, weights = nnx.split(moe)
    weights, mesh = nnx.to_pure_dict(weights), make_mesh(mesh)

    def loss(weights, x):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, weights)(x)[0]))

    one = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(weights, x)
    with jax.set_mesh(mesh):
        spread = jax.device_put(weights, shardings({"mlp": weights}, mesh)["mlp"])
        many = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(spread, x)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5 * max(1, np.abs(a).max()))


def test_each_device_of_the_expert_axis_has_its_own_experts():
    _, weights = nnx.split(with_adapters(make_moe(**EIGHT)))
    weights = nnx.to_pure_dict(weights)
    layout = shardings({"mlp": weights}, make_mesh("fsdp=2,expert=2,tensor=2"))["mlp"]
    down, router = (layout["experts"]["down"], layout["router"]["kernel"])
    assert down["kernel"].spec == P("expert", "tensor", "fsdp")
    assert down["adapter"]["lora_a"].spec == P("expert", "tensor", None)
    assert down["adapter"]["lora_b"].spec == P("expert", None, "fsdp")
    assert router.spec == P(("fsdp", "expert"), None)


def test_no_token_is_dropped_where_all_visit_the_experts_of_one_device():
    moe, x = make_moe(**EIGHT), jnp.abs(jax.random.normal(jax.random.key(1), (16, 32)))
    moe.router.kernel[...] = jnp.zeros((32, 8)).at[:, jnp.array([2, 3])].set(1.0)
    graphdef, weights = nnx.split(moe)
    with jax.set_mesh(make_mesh("fsdp=2,expert=4")):
        out, routing = jax.jit(lambda weights, x: nnx.merge(graphdef, weights)(x))(weights, x)
    assert set(np.unique(routing.chosen)) == {2, 3}
    np.testing.assert_allclose(out, written_out(moe, x), rtol=1e-5, atol=1e-5)


def test_balance_is_one_where_all_experts_are_used_alike_and_grows_with_the_preference_for_one():
    def balance(probabilities, chosen, real):
        visits, mass = balance_terms(Routing(jnp.asarray(probabilities), jnp.asarray(chosen)), jnp.asarray(real))
        return float(balance_loss(visits[None], mass[None], jnp.sum(jnp.asarray(real))))

    assert balance([[0.5, 0.5]] * 2, [[0], [1]], [True, True]) == pytest.approx(1.0)
    assert balance([[0.9, 0.1]] * 2, [[0], [0]], [True, True]) == pytest.approx(1.8)
    assert balance([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]], [[0], [1], [0]], [True, True, False]) == pytest.approx(1.0)
    assert balance([[0.9, 0.1]], [[0]], [False]) == 0.0


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_a_folder_is_read_to_where_its_experts_are(tmp_path, quantization):
    model = make_noisy_model(0, model_type="qwen3_moe", mlp_bias=None, hidden_size=64, **EXPERTS | {"num_experts": 8})
    save_pretrained(model, None, tmp_path / "a")
    one = from_pretrained(tmp_path / "a", quantization=quantization)
    spread = from_pretrained(tmp_path / "a", mesh=make_mesh("fsdp=2,expert=4"), quantization=quantization)
    for a, b in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(spread)), strict=True):
        np.testing.assert_array_equal(a, b)
    if quantization is None:
        save_pretrained(spread, None, tmp_path / "b")
        assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_tensor_that_is_not_finite_is_named_where_experts_are_split(tmp_path):
    model = make_noisy_model(0, model_type="qwen3_moe", mlp_bias=None, **EXPERTS | {"num_experts": 8})
    up = model.layers.mlp.experts.up.kernel
    up[...] = up[...].at[1, 6, 3, 3].set(np.nan)
    save_pretrained(model, None, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"in model\.layers\.1\.mlp\.experts\.6\.up_proj\.weight;"):
        from_pretrained(tmp_path / "a", mesh=make_mesh("fsdp=2,expert=4"))
