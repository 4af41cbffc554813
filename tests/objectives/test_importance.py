"""Completions of an earlier policy: what they weigh, by a loop over the tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.objectives.grpo import GRPO
from jaxpost.objectives.grpo_losses import truncated_weight
from jaxpost.objectives.rloo import RLOO
from tests.conftest import make_noisy_model
from tests.objectives.test_ppo import LENGTHS, rows

CAP = 1.4


@pytest.fixture(scope="module")
def model():
    return make_noisy_model(0)


def appraised(objective, model, *, stale):
    """Rows of two prompts with two completions each, that were sampled with other probabilities than the model's."""
    batch = {name: jnp.asarray(column) for name, column in rows([[0, 1], [2, 3]]).items()}
    batch["groups"] //= 2
    own = objective.token_logps(model, batch)
    noise = np.random.default_rng(3).normal(0, 0.4, own.shape).astype(np.float32)
    batch["sampled_logps"] = jnp.where(batch["sampled_logps"] != 0, own - noise, 0)
    return objective.appraise(model, None, batch, reused=False, stale=stale)


def targets(batch, row, segment):
    """Positions that predict a completion's tokens."""
    mask = (np.asarray(batch["segments"])[row] == segment + 1) & (np.asarray(batch["loss_mask"])[row] > 0)
    return np.flatnonzero(mask) - 1


def test_a_weight_is_the_ratio_up_to_the_cap():
    found = truncated_weight(jnp.log(jnp.array([0.5, 1.0, 2.0, 9.0])), 3.0)
    np.testing.assert_allclose(found, [0.5, 1, 2, 3], rtol=1e-6)


def test_grpo_weighs_tokens(model):
    objective = GRPO(loss_type="bnpo", scale_rewards="none", importance_sampling_cap=CAP)
    batch = appraised(objective, model, stale=True)
    loss, metrics = objective.loss(model, batch)
    weights, expected = [], 0.0
    for row, segment in np.ndindex(2, 2):
        for at in targets(batch, row, segment):
            moved = float(batch["old_logps"][row, at] - batch["sampled_logps"][row, at])
            weights.append(min(np.exp(moved), CAP))
            expected -= weights[-1] * float(batch["advantages"][row, segment])  # the ratio is 1
    assert len(weights) == sum(LENGTHS) and max(weights) == CAP
    np.testing.assert_allclose(loss.total, expected, rtol=1e-4)
    name = "sampling/importance_sampling_ratio"
    np.testing.assert_allclose(metrics[f"{name}/mean"].value(), np.mean(weights), rtol=1e-5)
    np.testing.assert_allclose(metrics[f"{name}/min"][0], min(weights), rtol=1e-5)


def test_rloo_weighs_completions(model):
    objective = RLOO(beta=0.0, importance_sampling_cap=CAP)
    batch = appraised(objective, model, stale=True)
    loss, _ = objective.loss(model, batch)
    expected = 0.0
    for row, segment in np.ndindex(2, 2):
        at = targets(batch, row, segment)
        moved = np.sum(np.asarray(batch["old_logps"] - batch["sampled_logps"])[row, at])
        expected -= min(np.exp(moved), CAP) * float(batch["advantages"][row, segment])
    np.testing.assert_allclose(loss.total, expected, rtol=1e-4)


def test_vespo_weighs_by_what_was_sampled(model):
    batch = appraised(GRPO(loss_type="vespo"), model, stale=True)
    np.testing.assert_array_equal(batch["old_logps"], batch["sampled_logps"])
    assert "importance" not in batch


@pytest.mark.parametrize("objective", [GRPO(), RLOO(beta=0.0)])
def test_nothing_is_weighed_that_the_policy_has_sampled_itself(objective, model):
    assert "importance" not in appraised(objective, model, stale=False)
