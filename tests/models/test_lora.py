"""Adapters by themselves: what they compute, what is trained of them, where they lie and how they are exchanged."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpost.models.adapters import (
    active_parts,
    attach,
    merge_adapter,
    set_adapter,
    without_adapters,
)
from jaxpost.models.config import Compute
from jaxpost.models.families import read_config
from jaxpost.models.hf import place
from jaxpost.models.layers import Linear
from jaxpost.models.lora import Copy, DropoutKey, LoRA, LoRAParam, trainable_filter, uniform_bits, with_dropout
from jaxpost.models.lora_config import LoraConfig
from jaxpost.models.quant import dequantize, quantize
from jaxpost.models.transformer import Decoder
from jaxpost.objectives.logps import score_tokens
from jaxpost.sharding import make_mesh, path_of
from tests.conftest import TINY_LLAMA, make_model

TOKENS = np.random.default_rng(0).integers(0, 320, (8, 12))
ALL = LoraConfig(r=4, target_modules="all-linear")
EVERYWHERE = LoraConfig(
    r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=True
)
MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    **dict.fromkeys(["rms_norm_eps"], 1e-5),
}


# Compiling is most of this file's time; see tests/parity/test_families.py. Newer versions of jax have no such emitters.
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False
quick_jit = partial(jax.jit, compiler_options=QUICK)


@quick_jit
def logits(model, tokens=TOKENS):
    return model(jnp.asarray(tokens))


@quick_jit
def gradient(model, tokens=TOKENS):
    """Of what is trained, by path."""
    graphdef, trained, others = nnx.split(model, trainable_filter(model), ...)
    total = jax.grad(lambda trained: jnp.sum(jnp.sin(nnx.merge(graphdef, trained, others)(jnp.asarray(tokens)))))
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(total(trained)))}


def make_moe():
    fields = {name: value for name, value in TINY_LLAMA.items() if not name.endswith("_bias")}
    return Decoder(read_config({**fields, **MOE}, "tiny"), rngs=nnx.Rngs(0))


def assert_close(ours, expected):
    """Trees of arrays that differ by rounding alone, each in its own measure."""
    assert ours.keys() == expected.keys()
    for path, leaf in ours.items():
        assert np.abs(leaf - expected[path]).max() < 2e-5 * np.abs(expected[path]).max(), path


def train_a_little(model, seed=0):
    """Noise on all that is trained; returns the model."""
    state = nnx.state(model, LoRAParam)
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    nnx.update(model, jax.tree.unflatten(treedef, noisy))
    return model


@pytest.mark.parametrize("changes", [{}, {"init_lora_weights": "gaussian"}, {"use_rslora": True}])
def test_a_new_adapter_changes_no_bit(changes):
    base = logits(make_model())
    adapted = attach(make_model(), dataclasses.replace(ALL, modules_to_save=["embed_tokens"], **changes))
    assert np.array_equal(logits(adapted), base)
    assert not np.array_equal(logits(train_a_little(adapted)), base)
    assert np.array_equal(logits(without_adapters(adapted)), base)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_one_that_begins_with_a_part_of_the_base_changes_nothing_but_has_a_large_gradient(init, dora):
    config = dataclasses.replace(ALL, init_lora_weights=init, use_dora=dora)
    adapted = attach(make_model(), config)
    np.testing.assert_allclose(logits(adapted), logits(make_model()), atol=1e-6)
    at_a = gradient(adapted)["layers.mlp.up.adapter.lora_a"]
    assert np.all(np.any(at_a, axis=(1, 2)))  # B is not 0


def test_pissa_holds_the_largest_singular_values():
    model = make_model()
    parts = active_parts(attach(model, dataclasses.replace(ALL, init_lora_weights="pissa")))
    part = parts["layers.mlp.up.adapter"]
    kernel = model.layers.mlp.up.kernel[...]
    left, values, right = np.linalg.svd(kernel, full_matrices=False)
    best = np.einsum("lir,lr,lro->lio", left[..., :4], values[..., :4], right[..., :4, :])
    np.testing.assert_allclose(part.scale[0] * (part.lora_a[...] @ part.lora_b[...]), best, atol=1e-5)


@pytest.mark.parametrize("config", [ALL, EVERYWHERE], ids=["lora", "dora"])
@pytest.mark.parametrize("make", [make_model, make_moe])
def test_decoding_uses_the_adapter_and_equals_the_forward_pass(config, make):
    if make is make_moe:
        config = dataclasses.replace(config, target_modules=["q_proj", "embed_tokens"]) if config.use_dora else config
    model, tokens = train_a_little(attach(make(), config)), jnp.asarray(TOKENS[:2, :9])
    full = logits(model, tokens)
    cached = decoded(model, tokens)
    places = np.array([4, 2])[:, None] + np.arange(3)
    np.testing.assert_allclose(cached, np.take_along_axis(full, places[..., None], axis=1), atol=2e-5)


@quick_jit
def decoded(model, tokens):
    """Logits after prompts of 5 and 3 tokens, and after each of two more."""
    h, cache = model.prefill(tokens[:, :5], jnp.array([5, 3]), 9)
    states = [h]
    for step in range(2):
        h, cache = model.decode(jnp.stack([tokens[0, 5 + step], tokens[1, 3 + step]]), cache)
        states.append(h)
    return model.unembed(jnp.stack(states, axis=1))


def test_what_is_trained():
    model = make_model()
    assert trainable_filter(model) is nnx.Param
    attach(model, EVERYWHERE)
    assert set(gradient(model)) == {
        *(f"layers.{path}.adapter.{name}" for path in ("attention.query", "mlp.down") for name in DORA),
        *(f"embed.adapter.{name}" for name in DORA),
        "embed.head_adapter.kernel",
    }
    assert trainable_filter(set_adapter(model, None)) is nnx.Param


DORA = ("lora_a", "lora_b", "magnitude")


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("make", [make_model, make_moe])
def test_remat_changes_no_gradient(remat, make):
    model = train_a_little(attach(make(), ALL))
    plain = gradient(model)
    model.compute = Compute(remat=remat)
    assert_close(gradient(model), plain)
    assert all(np.any(leaf) for leaf in plain.values())


def test_no_gradient_of_the_base_is_computed():
    """The largest product of a backward pass that trains all is the gradient of the embedding."""
    sizes = []
    for model in (make_model(vocab_size=4096), attach(make_model(vocab_size=4096), ALL)):
        graphdef, trained, others = nnx.split(model, trainable_filter(model), ...)
        total = jax.grad(
            lambda trained, others, graphdef=graphdef: jnp.sum(nnx.merge(graphdef, trained, others)(TOKENS))
        )
        sizes.append(jax.jit(total).lower(trained, others).compile().cost_analysis()["flops"])
    assert sizes[1] < 0.8 * sizes[0]


def test_layers_that_are_left_out_neither_act_nor_learn():
    config = dataclasses.replace(EVERYWHERE, target_modules=["q_proj"], modules_to_save=None, layers_to_transform=1)
    model = train_a_little(attach(make_model(), config))
    with_all = train_a_little(attach(make_model(), dataclasses.replace(config, layers_to_transform=None)))
    for path, leaf in gradient(model).items():
        assert not np.any(leaf[0]) and np.any(leaf[1]), path
    part = active_parts(model)["layers.attention.query.adapter"]
    assert part.ranks == (0, 4)
    x, kernel = jnp.ones((3, 32)), model.layers.attention.query.kernel[...]
    graphdef, state = nnx.split(part)
    first = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], state))
    assert np.array_equal(first.project(x, kernel[0]), x @ kernel[0])
    assert not np.array_equal(logits(model), logits(with_all))


def test_a_list_of_layers_leaves_out_what_is_in_none():
    config = LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "v_proj"], layers_to_transform=[0])
    assert {path: part.ranks for path, part in active_parts(attach(make_model(), config)).items()} == {
        "layers.attention.value.adapter": (4, 0)
    }


def test_a_head_learns_through_the_chunked_score():
    for config in (LoraConfig(r=4, target_modules=["lm_head"]), EVERYWHERE):
        model = train_a_little(attach(make_model(), config))
        graphdef, trained, others = nnx.split(model, LoRAParam, ...)
        h = jax.random.normal(jax.random.key(0), (2, 12, 32))
        targets, mask = jnp.asarray(TOKENS[:2]), jnp.ones((2, 12), bool)

        def chunked(trained, h=h, graphdef=graphdef, others=others, targets=targets, mask=mask):
            return score_tokens(nnx.merge(graphdef, trained, others), h, targets, mask, chunk=5).logps.sum()

        def whole(trained, h=h, graphdef=graphdef, others=others, targets=targets):
            logps = jax.nn.log_softmax(nnx.merge(graphdef, trained, others).unembed(h))
            return jnp.take_along_axis(logps, targets[..., None], axis=-1).sum()

        mine, expected = (jax.tree.leaves(jax.grad(loss)(trained)) for loss in (chunked, whole))
        for a, b in zip(mine, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
        assert any(np.any(leaf) for leaf in mine)


def dropping(adapter, key):
    adapter.key = DropoutKey(key)
    return adapter


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_where_pefts_is(dora):
    """x W + g (drop(x) A) (s B) + (g - 1) drop(x) W, with g = 1 without DoRA."""
    key, names = jax.random.key(3), ("lora_a", "lora_b", "magnitude" if dora else "scale")
    shapes = {"lora_a": (8, 2), "lora_b": (2, 5), "magnitude": (5,)}
    arrays = {name: jax.random.normal(jax.random.key(index), shapes.get(name, ())) for index, name in enumerate(names)}
    arrays["scale"] = jnp.float32(1.5)
    layer = Linear(8, 5, bias=True, rngs=nnx.Rngs(0))
    layer.bias = nnx.Param(jnp.arange(5.0))
    layer.adapter = dropping(LoRA(arrays, (2,), 0.4), key)
    x, kernel = jax.random.normal(jax.random.key(9), (64, 8)), layer.kernel[...]
    kept = jnp.where(uniform_bits(key, x.shape) < np.uint32(0.4 * 2**32), 0, x / 0.6)
    update = kept @ arrays["lora_a"] @ (1.5 * arrays["lora_b"])
    expected = x @ kernel + jnp.arange(5.0) + update
    if dora:
        length = jnp.linalg.norm(kernel + 1.5 * arrays["lora_a"] @ arrays["lora_b"], axis=0)
        gain = arrays["magnitude"] / length
        expected += (gain - 1) * (kept @ kernel + update)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    assert 0.3 < np.mean(np.asarray(kept) == 0) < 0.5


def test_dropout_is_a_pure_function_of_the_key():
    config = dataclasses.replace(ALL, lora_dropout=0.3)
    model = train_a_little(attach(make_model(), config))
    calm = logits(model)
    first, again, other = (logits(with_dropout(model, jax.random.key(seed))) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other) and not np.array_equal(first, calm)
    assert np.array_equal(logits(model), calm)  # evaluation and generation know of no key
    keys = [
        jax.random.key_data(part.key[...]).reshape(-1, 2)
        for part in active_parts(with_dropout(model, jax.random.key(1))).values()
    ]
    assert len({tuple(key) for key in np.concatenate(keys)}) == 7 * 2  # each module of each layer has its own
    none = attach(make_model(), ALL)
    assert with_dropout(none, jax.random.key(1)).layers.mlp.up.adapter.key is None


def test_dropout_leaves_the_mean():
    layer = Linear(8, 5, rngs=nnx.Rngs(0))
    arrays = {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 5)), "scale": jnp.float32(1.0)}
    layer.adapter = LoRA(arrays, (2,), 0.5)
    x = jax.random.normal(jax.random.key(0), (3, 8))
    calm, keys = layer(x), jax.random.split(jax.random.key(1), 4000)
    drawn = jax.jit(jax.vmap(lambda key: with_dropout(layer, key)(x)))(keys)
    spread = np.std(drawn, axis=0) / np.sqrt(4000)
    assert np.all(np.abs(np.mean(drawn, axis=0) - calm) < 4 * spread) and np.all(spread > 0)


def test_the_same_seed_draws_the_same_adapter_and_each_module_its_own():
    parts = [active_parts(attach(make_model(), ALL, seed=seed)) for seed in (0, 0, 1)]
    a = "layers.attention.key.adapter", "layers.attention.value.adapter"
    assert np.array_equal(parts[0][a[0]].lora_a[...], parts[1][a[0]].lora_a[...])
    assert not np.array_equal(parts[0][a[0]].lora_a[...], parts[2][a[0]].lora_a[...])
    assert not np.array_equal(parts[0][a[0]].lora_a[...], parts[0][a[1]].lora_a[...])
    assert not np.array_equal(parts[0][a[0]].lora_a[0], parts[0][a[0]].lora_a[1])


@pytest.mark.parametrize("make", [make_model, make_moe])
def test_many_devices_are_one(make):
    saved = dict(modules_to_save=["embed_tokens", "lm_head"], init_lora_weights="pissa")
    config = dataclasses.replace(ALL, **saved)
    one = train_a_little(attach(make(), config))
    mesh = make_mesh("fsdp=4,tensor=2")
    many = attach(place(make(), Compute(), mesh), config)
    for path, part in active_parts(many).items():
        for name, variable in nnx.to_pure_dict(nnx.state(part)).items():
            assert variable.sharding.mesh == mesh, (path, name)
    train_a_little(many)
    with jax.set_mesh(mesh):
        got, gradients = logits(many), gradient(many)
        merged = logits(merge_adapter(many))
    np.testing.assert_allclose(got, logits(one), atol=1e-4)
    np.testing.assert_allclose(merged, logits(one), atol=1e-4)
    assert_close(gradients, gradient(one))


def test_arrays_are_split_like_the_kernel_beside_them_and_drawn_alike():
    mesh = make_mesh("fsdp=4,tensor=2")
    config = dataclasses.replace(ALL, use_dora=True, lora_dropout=0.2)
    one, many = attach(make_model(), config), attach(place(make_model(), Compute(), mesh), config)
    specs = {path: nnx.to_pure_dict(nnx.state(part)) for path, part in active_parts(many).items()}
    down = {name: array.sharding.spec for name, array in specs["layers.mlp.down.adapter"].items()}
    assert down["lora_a"][1] == "tensor" and down["lora_b"][2] == "fsdp" and down["magnitude"][1] == "fsdp"
    for path, part in active_parts(one).items():
        assert np.array_equal(part.lora_a[...], specs[path]["lora_a"])
    train_a_little(one), train_a_little(many)
    expected = logits(with_dropout(one, jax.random.key(0)))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits(with_dropout(many, jax.random.key(0))), expected, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_beside_a_quantised_kernel(dora):
    config = dataclasses.replace(ALL, use_dora=dora)
    quantized, plain = (quantize(make_model(), "nf4"), dequantize(quantize(make_model(), "nf4"), "float32"))
    train_a_little(attach(quantized, config)), train_a_little(attach(plain, config))
    np.testing.assert_allclose(logits(quantized), logits(plain), atol=2e-5)
    assert_close(gradient(quantized), gradient(plain))


def test_adapters_compute_in_the_dtype_of_activations_and_stay_float32():
    model = train_a_little(attach(make_model(), EVERYWHERE))
    exact = logits(model)
    model.compute = Compute(dtype="bfloat16")
    rough = logits(model)
    assert rough.dtype == np.float32 and 0 < np.abs(rough - exact).max() < 0.2
    assert {leaf.dtype for leaf in gradient(model).values()} == {jnp.dtype(jnp.float32)}
    assert all(isinstance(part, Copy | LoRA) for part in active_parts(model).values())


def test_random_bits_are_uniform_and_do_not_depend_on_each_other():
    shape = (512, 1024)
    draws = [np.asarray(uniform_bits(jax.random.fold_in(jax.random.key(0), i), shape)) for i in range(3)]
    for bits in draws:
        uniform = bits / 2**32
        # 4.5 standard deviations of what truly random ones would give
        for share in (0.05, 0.5, 0.9):
            assert abs(np.mean(uniform < share) - share) < 4.5 * np.sqrt(share * (1 - share) / bits.size)
        for axis in (0, 1):
            for lag in (1, 2, 64):
                one, other = (
                    np.take(uniform, range(*ends), axis) for ends in ((lag, shape[axis]), (0, shape[axis] - lag))
                )
                assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4.5 / np.sqrt(one.size)
        ones = np.unpackbits(bits.view(np.uint8)).mean()
        assert abs(ones - 0.5) < 4.5 * 0.5 / np.sqrt(32 * bits.size)
        rows = (uniform < 0.05).sum(axis=1)  # as spread as a binomial's
        assert abs(rows.var() / (1024 * 0.05 * 0.95) - 1) < 4.5 * np.sqrt(2 / 512)
    assert abs(np.corrcoef(draws[0].ravel(), draws[1].ravel())[0, 1]) < 4.5 / np.sqrt(draws[0].size)
    assert len({bits.tobytes() for bits in draws}) == 3
