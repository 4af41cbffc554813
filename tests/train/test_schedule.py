"""The schedules' numbers (stored from transformers) and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.train.optim import OptimConfig, make_schedule

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


@pytest.mark.parametrize(
    ("fields", "words"),
    [
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
