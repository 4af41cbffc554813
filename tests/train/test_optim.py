"""The optimizers' numbers (stored from torch, or by their papers' equations) and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost.errors import ConfigError
from jaxpost.train.optim import (
    ALIASES,
    OPTIMIZERS,
    OptimConfig,
    check_loraplus,
    clip_by_global_norm,
    make_optimizer,
    make_schedule,
    orthogonalize,
)
from jaxpost.train.state import decay_mask

SHAPES = {
    "embed.embedding": (96, 64),
    "layers.mlp.down.kernel": (2, 96, 512),  # 8-bit blocks lie across the devices of fsdp=4
    "layers.mlp.up.kernel": (2, 64, 1024),
    "layers.experts.up.kernel": (2, 3, 64, 32),
    "layers.mlp.up.adapter.lora_b": (2, 8, 1024),
    "layers.mlp_norm.scale": (2, 64),
    "layers.mlp.up.bias": (2, 1024),
    "head.kernel": (64, 96),
}
SMALL = {name: SHAPES[name] for name in ("layers.mlp.up.kernel", "layers.mlp.up.bias")}


def make_tree(seed=0, shapes=SHAPES, dtype=jnp.float32):
    """Random arrays as a nested dict."""
    rng = np.random.default_rng(seed)
    tree = {}
    for path, shape in shapes.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(rng.normal(size=shape), dtype)
    return tree


def make(optim="adamw", *, learning_rate=1e-3, weight_decay=0.1, **fields):
    config = OptimConfig(
        optim=optim, learning_rate=learning_rate, weight_decay=weight_decay, lr_scheduler_type="constant", **fields
    )
    return make_optimizer(config, make_schedule(config, 100), decay_mask)


def walk(optimizer, params, grads):
    """Parameters and state after one update for each tree of gradients."""
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _experts(tree):
    return jax.tree.map(lambda branch: branch["layers"]["experts"], tree, is_leaf=lambda node: "layers" in node)


def assert_close(ours, theirs, **tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), **tolerance)


def test_adamw_is_optax_adamw_to_the_bit():
    params, grads = make_tree(), [make_tree(seed) for seed in range(1, 6)]
    theirs = optax.adamw(optax.constant_schedule(1e-3), b1=0.8, b2=0.95, eps=1e-7, weight_decay=0.1, mask=decay_mask)
    ours = walk(make(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7), params, grads)
    assert_close(ours, walk(theirs, params, grads), rtol=0)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_transformers_names_are_aliases(alias, name):
    params, grads = make_tree(0, SMALL), [make_tree(1, SMALL), make_tree(2, SMALL)]
    assert_close(walk(make(alias), params, grads), walk(make(name), params, grads), rtol=0)


def test_lion_follows_its_paper():
    """Algorithm 2 of Chen et al., 2023, arXiv:2302.06675, in float64."""
    params, grads = make_tree(), [make_tree(seed) for seed in range(1, 11)]
    ours, _ = walk(make("lion", learning_rate=1e-2, adam_beta1=0.9, adam_beta2=0.99), params, grads)
    for name, decay in (("kernel", 0.1), ("bias", 0.0)):
        theta = np.asarray(params["layers"]["mlp"]["up"][name], np.float64)
        momentum = np.zeros_like(theta)
        for grad in grads:
            gradient = np.asarray(grad["layers"]["mlp"]["up"][name], np.float64)
            direction = np.sign(0.9 * momentum + 0.1 * gradient)
            momentum = 0.99 * momentum + 0.01 * gradient
            theta -= 1e-2 * (direction + decay * theta)
        np.testing.assert_allclose(ours["layers"]["mlp"]["up"][name], theta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optim", ["adafactor", "muon"])
def test_each_matrix_of_a_stack_is_on_its_own(optim):
    shapes = {"layers.experts.up.kernel": SHAPES["layers.experts.up.kernel"], **SMALL}
    params, grads = make_tree(0, shapes), [make_tree(seed, shapes) for seed in range(1, 4)]
    whole, _ = walk(make(optim), params, grads)
    for layer in range(2):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], (params, grads))
        alone, _ = walk(make(optim), *one)
        assert_close(jax.tree.map(lambda leaf, layer=layer: leaf[layer], whole), alone, rtol=1e-6, atol=1e-7)
        for expert in range(3):
            one = jax.tree.map(lambda leaf, at=(layer, expert): leaf[at], _experts((params, grads)))
            alone, _ = walk(make(optim), *one)
            one = jax.tree.map(lambda leaf, at=(layer, expert): leaf[at], _experts(whole))
            assert_close(one, alone, rtol=1e-6, atol=1e-7)


def test_orthogonalize_brings_singular_values_near_one():
    kernels = make_tree()["layers"]["mlp"]["up"]["kernel"]
    assert float(np.linalg.cond(kernels[0])) > 1.5
    for stack in (kernels, kernels.mT):
        values = np.linalg.svd(orthogonalize(stack), compute_uv=False)
        assert values.min() > 0.6 and values.max() < 1.3


def test_muon_leaves_embeddings_heads_and_vectors_to_adamw():
    params, grads = make_tree(), [make_tree(1), make_tree(2)]
    (muon, _), (adamw, _) = walk(make("muon"), params, grads), walk(make("adamw"), params, grads)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), muon, adamw)
    assert same == {
        "embed": {"embedding": True},
        "head": {"kernel": True},
        "layers": {
            "mlp": {"down": {"kernel": False}, "up": {"kernel": False, "bias": True, "adapter": {"lora_b": False}}},
            "experts": {"up": {"kernel": False}},
            "mlp_norm": {"scale": True},
        },
    }


def test_muon_moves_as_far_as_adamw():
    """Its updates are as large as AdamW's usually are, so AdamW's learning rates serve: RMS 0.2 to within a third."""
    params, grads = make_tree(), [make_tree(1)]
    moved, _ = walk(make("muon", weight_decay=0.0, learning_rate=1.0), params, grads)
    for name in ("up", "down"):
        step = moved["layers"]["mlp"][name]["kernel"] - params["layers"]["mlp"][name]["kernel"]
        assert 0.13 < float(jnp.sqrt(jnp.mean(step**2))) < 0.27


LORA = {"layers.query.adapter.lora_a": (2, 64, 8), "layers.query.adapter.lora_b": (2, 8, 64)}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_loraplus_multiplies_the_learning_rate_of_lora_b(optim):
    params, grads = make_tree(0, LORA), [make_tree(1, LORA)]
    plain, _ = walk(make(optim), params, grads)
    faster, _ = walk(make(optim, loraplus_lr_ratio=16.0), params, grads)
    start, plain, faster = (tree["layers"]["query"]["adapter"] for tree in (params, plain, faster))
    np.testing.assert_array_equal(faster["lora_a"], plain["lora_a"])
    expected = start["lora_b"] + 16 * (plain["lora_b"] - start["lora_b"])  # the decay's share too
    np.testing.assert_allclose(faster["lora_b"], expected, atol=1e-5)
    assert float(jnp.abs(faster["lora_b"] - start["lora_b"]).max()) > 1e-3


def test_loraplus_without_lora_is_refused():
    config = OptimConfig(loraplus_lr_ratio=16.0)
    check_loraplus(config, make_tree(0, LORA))
    check_loraplus(OptimConfig(), make_tree(0, SMALL))
    with pytest.raises(ConfigError, match="loraplus_lr_ratio is 16"):
        check_loraplus(config, make_tree(0, SMALL))
    with pytest.raises(ConfigError, match="loraplus_lr_ratio is 16"):
        jax.eval_shape(make(loraplus_lr_ratio=16.0).init, make_tree(0, SMALL))


def test_moments_are_float32_for_bfloat16_parameters():
    config = OptimConfig(learning_rate=1e-2)
    params = {"kernel": jnp.ones((3,), jnp.bfloat16)}
    optimizer = make_optimizer(config, make_schedule(config, 10), {"kernel": True})
    state = optimizer.init(params)
    updates, new_state = jax.jit(optimizer.update)({"kernel": jnp.ones((3,), jnp.bfloat16)}, state, params)
    for tree in (state, new_state):
        floats = [leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert floats == [jnp.float32, jnp.float32]
    assert optax.apply_updates(params, updates)["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_bfloat16_parameters_are_updated_in_float32(optim):
    optimizer = make(optim)
    narrow = make_tree(0, SMALL, jnp.bfloat16), make_tree(1, SMALL, jnp.bfloat16)
    results = []
    for params, grads in (narrow, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)):
        state = jax.jit(optimizer.init)(params)
        results.append(jax.jit(optimizer.update)(grads, state, params)[0])
    assert_close(*results, rtol=1e-5, atol=1e-8)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(results[0]))


def test_optimizer_does_not_clip():
    config = OptimConfig(learning_rate=1.0, adam_beta1=0.0, max_grad_norm=1e-3, lr_scheduler_type="constant")
    optimizer = make_optimizer(config, make_schedule(config, 1), True)
    state = optimizer.init(jnp.zeros(2))
    _, state = optimizer.update(jnp.asarray([3.0, 4.0]), state, jnp.zeros(2))
    np.testing.assert_allclose(optax.tree.get(state, "mu"), [3.0, 4.0])


def test_clip_scales_to_the_norm_and_reports_the_norm_before():
    grads = {"a": jnp.asarray([3.0]), "b": jnp.asarray([[4.0]], jnp.bfloat16)}
    clipped, norm = clip_by_global_norm(grads, 1.0)
    assert norm.dtype == jnp.float32 and float(norm) == 5.0
    assert clipped["b"].dtype == jnp.bfloat16
    np.testing.assert_allclose(clipped["a"], 3.0 / (5.0 + 1e-6), rtol=1e-7)
    np.testing.assert_allclose(np.asarray(clipped["b"], np.float32), 0.8, rtol=4e-3)


@pytest.mark.parametrize("max_norm", [None, 0.0, -1.0, 5.1])
def test_clip_leaves_gradients_alone(max_norm):
    clipped, norm = clip_by_global_norm([jnp.asarray([3.0, 4.0])], max_norm)
    assert clipped[0].tolist() == [3.0, 4.0]
    assert float(norm) == 5.0


def test_norm_of_bfloat16_gradients_is_float32():
    norm = clip_by_global_norm(jnp.ones((10_100,), jnp.bfloat16), None)[1]  # bfloat16 would give 100.5
    np.testing.assert_allclose(norm, 10_100**0.5, rtol=1e-6)


def test_a_nan_gradient_shows_in_the_norm():
    assert bool(jnp.isnan(clip_by_global_norm(jnp.asarray([1.0, jnp.nan]), 1.0)[1]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"learning_rate": -1e-5}, ["learning_rate", "-1e-05"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "finite"]),
        ({"learning_rate": "1e-5"}, ["learning_rate", "'1e-5'"]),
        ({"weight_decay": -0.1}, ["weight_decay"]),
        ({"adam_beta1": 1.0}, ["adam_beta1", "below 1"]),
        ({"adam_beta2": 1.5}, ["adam_beta2", "below 1"]),
        ({"adam_epsilon": 0.0}, ["adam_epsilon"]),
        ({"max_grad_norm": float("nan")}, ["max_grad_norm"]),
        ({"optim": "adamw_troch"}, ["optim", "did you mean 'adamw_torch'", "muon"]),
        ({"optim": "sgd"}, ["optim", "'sgd'", "adafactor"]),
        ({"loraplus_lr_ratio": -1.0}, ["loraplus_lr_ratio"]),
        ({"loraplus_lr_ratio": 0.0}, ["loraplus_lr_ratio", "lora_b"]),
    ],
)
def test_mistakes_name_the_field(fields, words):
    with pytest.raises(ConfigError) as caught:
        OptimConfig(**fields)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
