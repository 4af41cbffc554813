"""Schedules, AdamW and clipping against transformers and torch."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost.train.optim import OptimConfig, clip_by_global_norm, make_optimizer, make_schedule

pytestmark = pytest.mark.parity

TOTAL_STEPS = 50
LEARNING_RATE = 3e-4
SCHEDULES = [
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_min_lr", {"min_lr": 2e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.5}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 13}),
    ("warmup_stable_decay", {"num_decay_steps": 20}),
    ("warmup_stable_decay", {"num_decay_steps": 11, "num_stable_steps": 9, "min_lr_ratio": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 20, "warmup_type": "cosine", "decay_type": "linear"}),
    ("warmup_stable_decay", {"num_decay_steps": 20, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"}),
]


def reference_rates(name, kwargs, warmup_steps):
    """Learning rates of the 50 updates of a transformers run."""
    import torch
    from transformers import TrainingArguments
    from transformers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LEARNING_RATE)
    num_warmup = TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=warmup_steps), TOTAL_STEPS)
    scheduler = get_scheduler(name, optimizer, num_warmup, TOTAL_STEPS, dict(kwargs))
    rates = []
    for _ in range(TOTAL_STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 7}, {"warmup_steps": 0.13}, {"warmup_ratio": 0.07}])
@pytest.mark.parametrize(("name", "kwargs"), SCHEDULES)
def test_schedule_equals_transformers(name, kwargs, warmup):
    config = OptimConfig(
        learning_rate=LEARNING_RATE, lr_scheduler_type=name, lr_scheduler_kwargs=json.dumps(kwargs), **warmup
    )
    expected = reference_rates(name, kwargs, warmup.get("warmup_ratio", warmup.get("warmup_steps", 0)))
    schedule = make_schedule(config, TOTAL_STEPS)
    traced = jax.jit(jax.vmap(schedule))(jnp.arange(TOTAL_STEPS, dtype=jnp.int32))
    np.testing.assert_allclose(traced, expected, rtol=1e-6)
    np.testing.assert_allclose([schedule(step) for step in (0, 1, 8, 49)], np.take(expected, (0, 1, 8, 49)), rtol=1e-6)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.85, 0.95)])
def test_adamw_equals_torch(betas):
    import torch

    rng = np.random.default_rng(0)
    start = {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in {"kernel": (5, 7), "bias": (7,)}.items()
    }
    grads = [{name: rng.normal(size=a.shape).astype(np.float32) for name, a in start.items()} for _ in range(20)]
    config = OptimConfig(
        learning_rate=1e-2,
        weight_decay=0.1,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        lr_scheduler_type="cosine",
        warmup_steps=3,
    )

    theirs = {name: torch.nn.Parameter(torch.from_numpy(a.copy())) for name, a in start.items()}
    groups = [{"params": [theirs["kernel"]], "weight_decay": 0.1}, {"params": [theirs["bias"]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=betas, eps=1e-8)
    from transformers.optimization import get_scheduler

    scheduler = get_scheduler("cosine", adamw, 3, 20)

    optimizer = make_optimizer(config, make_schedule(config, 20), {"kernel": True, "bias": False})
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grad in grads:
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(grad[name])
        adamw.step()
        scheduler.step()
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        for name, parameter in theirs.items():
            np.testing.assert_allclose(params[name], parameter.detach().numpy(), rtol=1e-6, atol=1e-6)
    assert float(np.abs(params["kernel"] - start["kernel"]).max()) > 0.02


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e4])
def test_clipping_equals_torch(max_norm):
    import torch

    rng = np.random.default_rng(1)
    grads = [rng.normal(size=shape).astype(np.float32) for shape in [(4, 6), (9,), ()]]
    parameters = [torch.nn.Parameter(torch.zeros(grad.shape)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = torch.from_numpy(np.array(grad))
    expected_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    clipped, norm = jax.jit(clip_by_global_norm, static_argnums=1)([jnp.asarray(grad) for grad in grads], max_norm)
    np.testing.assert_allclose(norm, expected_norm.item(), rtol=1e-6)
    for ours, parameter in zip(clipped, parameters, strict=True):
        np.testing.assert_allclose(ours, parameter.grad.numpy(), rtol=1e-6)
