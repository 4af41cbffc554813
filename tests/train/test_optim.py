"""The optimizer's numbers (stored from transformers and torch) and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost.errors import ConfigError
from jaxpost.train.optim import OptimConfig, clip_by_global_norm, make_optimizer, make_schedule

COUNTS = [0, 1, 3, 4, 5, 10, 19]
# transformers.get_scheduler with lr 1, 4 warm-up and 20 total steps, at COUNTS.
STORED_RATES = [
    ("constant", None, [1, 1, 1, 1, 1, 1, 1]),
    ("constant_with_warmup", None, [0, 0.25, 0.75, 1, 1, 1, 1]),
    ("linear", None, [0, 0.25, 0.75, 1, 0.9375, 0.625, 0.0625]),
    ("cosine", None, [0, 0.25, 0.75, 1, 0.9903926402, 0.6913417162, 0.0096073598]),
    ("cosine_with_min_lr", '{"min_lr": 0.1}', [0, 0.25, 0.75, 1, 0.9913533762, 0.7222075446, 0.1086466238]),
    ("inverse_sqrt", None, [0, 0.25, 0.75, 1, 0.8944271910, 0.6324555320, 0.4588314677]),
    ("warmup_stable_decay", '{"num_decay_steps": 8}', [0, 0.25, 0.75, 1, 1, 1, 0.0380602337]),
]


@pytest.mark.parametrize(("name", "kwargs", "expected"), STORED_RATES)
def test_schedule_stored_numbers(name, kwargs, expected):
    config = OptimConfig(learning_rate=1.0, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=4)
    rates = jax.jit(jax.vmap(make_schedule(config, 20)))(jnp.asarray(COUNTS, jnp.int32))
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_cosine_keeps_its_digits_at_the_end_of_a_long_run():
    schedule = make_schedule(OptimConfig(learning_rate=1.0, lr_scheduler_type="cosine"), 100_000)
    expected = np.sin(np.pi / 2 / 100_000) ** 2
    np.testing.assert_allclose(schedule(99_999), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"warmup_steps": 5}, 5),
        ({"warmup_steps": 1}, 1),
        ({"warmup_steps": 0.03}, 3),
        ({"warmup_steps": 0.031}, 4),
        ({"warmup_ratio": 0.1}, 10),
        ({"warmup_ratio": 1.0}, 100),
        ({}, 0),
    ],
)
def test_warmup_reaches_the_peak_at_its_step(fields, steps):
    schedule = make_schedule(OptimConfig(learning_rate=1.0, lr_scheduler_type="constant_with_warmup", **fields), 100)
    rates = jax.vmap(schedule)(jnp.arange(101))
    assert int(jnp.argmax(rates == 1.0)) == steps
    assert bool(jnp.all(rates[:steps] < 1.0))


def test_kwargs_may_be_a_mapping_as_yaml_gives_it():
    fields = {"learning_rate": 1.0, "lr_scheduler_type": "cosine_with_min_lr"}
    from_text = make_schedule(OptimConfig(lr_scheduler_kwargs='{"min_lr_rate": 0.5}', **fields), 10)
    from_mapping = make_schedule(OptimConfig(lr_scheduler_kwargs={"min_lr_rate": 0.5}, **fields), 10)
    assert float(from_text(7)) == float(from_mapping(7)) > 0.5


def test_adamw_stored_numbers():
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, lr_scheduler_type="constant")
    params = {"kernel": jnp.asarray([1.0, -2.0]), "bias": jnp.asarray([1.0, -2.0])}
    optimizer = make_optimizer(config, make_schedule(config, 3), {"kernel": True, "bias": False})
    state = optimizer.init(params)
    for grad in ([0.3, -0.1], [0.1, 0.4], [-0.2, 0.0]):
        updates, state = optimizer.update({name: jnp.asarray(grad) for name in params}, state, params)
        params = optax.apply_updates(params, updates)
    # torch.optim.AdamW, lr 0.1, the same gradients; weight decay 0.5 for the kernel, 0 for the bias.
    np.testing.assert_allclose(params["kernel"], [0.66165141, -1.72090262], rtol=1e-5)
    np.testing.assert_allclose(params["bias"], [0.790171091, -1.999200138], rtol=1e-5)


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
        ({"warmup_steps": -1}, ["warmup_steps"]),
        ({"warmup_steps": 2.5}, ["warmup_steps", "whole"]),
        ({"warmup_ratio": 1.5}, ["warmup_ratio", "above 1"]),
        ({"warmup_ratio": 0.1, "warmup_steps": 10}, ["warmup_ratio", "warmup_steps"]),
        ({"lr_scheduler_type": "cosin"}, ["lr_scheduler_type", "'cosine'"]),
        ({"lr_scheduler_kwargs": "min_lr=1"}, ["lr_scheduler_kwargs", "JSON"]),
        ({"lr_scheduler_kwargs": "[1]"}, ["lr_scheduler_kwargs", "JSON object"]),
        ({"lr_scheduler_kwargs": '{"num_cycles": 2}'}, ["num_cycles", "linear", "none"]),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycle": 2}'},
            ["num_cycle", "did you mean 'num_cycles'"],
        ),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": "two"}'}, ["num_cycles", "number"]),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ["min_lr", "min_lr_rate"]),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-6, "min_lr_rate": 0.1}'},
            ["one of min_lr"],
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-3}'},
            ["min_lr", "learning_rate"],
        ),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": '{"timescale": 0}'}, ["timescale"]),
        ({"lr_scheduler_type": "warmup_stable_decay"}, ["num_decay_steps"]),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": '{"num_decay_steps": 3, "decay_type": "sqrt"}',
            },
            ["decay_type", "1-sqrt"],
        ),
    ],
)
def test_mistakes_name_the_field(fields, words):
    with pytest.raises(ConfigError) as caught:
        OptimConfig(**fields)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_run_too_short_for_its_phases_is_refused():
    config = OptimConfig(
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs='{"num_decay_steps": 8}', warmup_steps=4
    )
    make_schedule(config, 12)
    with pytest.raises(ConfigError, match="num_decay_steps is 8"):
        make_schedule(config, 11)
