"""PPO's maths against loops in float64, and what must not change its numbers: packing, padding, micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxpost.errors import ConfigError
from jaxpost.metrics import Tally, masked_variance
from jaxpost.models.actor_critic import as_copy, on_trunk, trainable_of
from jaxpost.models.config import Compute
from jaxpost.models.hf import place
from jaxpost.objectives.ppo import PPO
from jaxpost.objectives.ppo_losses import controlled, gae, whitened
from jaxpost.sharding import make_mesh, put
from jaxpost.train.state import create_state, merge
from jaxpost.train.step import InParts, make_annotate, make_step, remembered
from tests.conftest import make_model, make_noisy_model

LENGTHS = (3, 6, 1, 5)  # of the completions of a row; 6 is all there is room for
PROMPT = 4


def advantages_of(rewards, values, gamma, lam):
    """Of one completion, as the paper has it: a sum over what follows."""
    count, following = len(rewards), [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(count)]
    return [sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, count)) for t in range(count)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_gae_equals_a_loop_over_each_completion(gamma, lam):
    rng = np.random.default_rng(0)
    segments, states, expected = np.zeros((3, 40), int), np.zeros((3, 40), bool), np.zeros((3, 40))
    rewards, values = rng.normal(size=(2, 3, 40))
    for row in range(3):
        at = 0
        for segment, length in enumerate(rng.permutation([3, 9, 1, 6]), start=1):
            prompt = int(rng.integers(0, 4))  # 0: the states of two completions are neighbours
            states[row, at + prompt : at + prompt + length] = True
            segments[row, at : at + prompt + length] = segment
            inner = slice(at + prompt, at + prompt + length)
            expected[row, inner] = advantages_of(rewards[row, inner], values[row, inner], gamma, lam)
            at += prompt + length
    with jax.enable_x64(True):
        arrays = (jnp.asarray(x) for x in (rewards, values, states, segments))
        advantages, returns = gae(*arrays, gamma=gamma, lam=lam)
    np.testing.assert_allclose(advantages, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(returns, np.where(states, expected + values, 0), rtol=1e-9, atol=1e-12)


def test_whitening_is_of_what_the_mask_has():
    values, mask = np.random.default_rng(1).normal(3, 2, (4, 9)), np.random.default_rng(2).random((4, 9)) < 0.5
    known = values[mask]
    with jax.enable_x64(True):
        poisoned = jnp.where(mask, values, jnp.nan)
        found, unshifted = (whitened(poisoned, jnp.asarray(mask), shift_mean=shift) for shift in (True, False))
    expected = (known - known.mean()) / np.sqrt(known.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(np.asarray(found)[mask], expected, rtol=1e-9)
    np.testing.assert_allclose(np.asarray(unshifted)[mask], expected + known.mean(), rtol=1e-9)
    assert not np.asarray(found)[~mask].any() and not np.asarray(unshifted)[~mask].any()
    alone = jnp.asarray([[True, False]])
    assert (
        np.isfinite(whitened(jnp.ones((1, 2)), alone)).all() and np.isfinite(whitened(jnp.ones((1, 2)), ~alone)).all()
    )


def test_the_controller_moves_the_coefficient_towards_the_target():
    factor, coefficient = jnp.zeros(()), 1.0
    for kl in (12.0, 6.3, 6.0, 1.0):
        factor = controlled(factor, jnp.float32(kl), jnp.float32(64), target=6.0, horizon=1000.0)
        coefficient *= 1 + np.clip(kl / 6 - 1, -0.2, 0.2) * 64 / 1000
        np.testing.assert_allclose(jnp.exp(factor), coefficient, rtol=1e-6)


def test_the_variance_of_parts_is_that_of_the_whole():
    values = np.random.default_rng(3).normal(1, 1e-3, (4, 50)).astype(np.float32)
    tally = Tally()
    for row in values:
        tally.add({"ratio_var": masked_variance(jnp.asarray(row), jnp.ones(50, bool), around=1.0)})
    np.testing.assert_allclose(tally.values()["ratio_var"], values.astype(float).var(), rtol=1e-4)


def rows(layout, width=56, seed=0, tail=0):
    """Completions dealt to rows as `layout` says, each with its prompt; `tail` fills what comes after with noise."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(3, 300, PROMPT + length) for length in LENGTHS]
    said = [np.concatenate([np.zeros(PROMPT - 1), -rng.random(length), [0]]) for length in LENGTHS]
    shape = (len(layout), width)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segments")}
    batch |= {name: np.zeros(shape, np.float32) for name in ("loss_mask", "sampled_logps")}
    batch["tokens"] += np.int32(tail)
    slots = (len(layout), max(map(len, layout)))
    batch |= {name: np.zeros(slots, np.float32) for name in ("examples", "ended", "num_trained")}
    batch |= {"groups": np.zeros(slots, np.int32), "rewards": np.full((*slots, 2), np.nan, np.float32)}
    for row, members in enumerate(layout):
        at = 0
        for slot, number in enumerate(members):
            inner = slice(at, at + len(texts[number]))
            batch["tokens"][row, inner], batch["segments"][row, inner] = texts[number], slot + 1
            batch["positions"][row, inner] = np.arange(len(texts[number]))
            batch["loss_mask"][row, inner] = np.arange(len(texts[number])) >= PROMPT
            batch["sampled_logps"][row, inner] = said[number]
            batch["examples"][row, slot], batch["groups"][row, slot] = 1, number
            batch["ended"][row, slot], batch["num_trained"][row, slot] = LENGTHS[number] < 6, LENGTHS[number]
            batch["rewards"][row, slot] = [0.3 * number - 0.2, np.nan]
            at += len(texts[number])
    return batch


def updated(batch, *, objective, micro=1, devices=1, make=as_copy, rate=1e-2, steps=1):
    """What one step makes of a batch: appraised columns, metrics, parameters."""
    mesh = make_mesh(devices=jax.devices()[:devices])
    schedule = optax.constant_schedule(rate)
    optimizer = optax.sgd(schedule)
    with jax.set_mesh(mesh):
        model = make(place(make_noisy_model(0), Compute(), mesh))
        noise = jax.random.normal(jax.random.key(1), model.critic.head.kernel[...].shape) * 0.3
        model.critic.head.kernel[...] = noise
        reference = place(make_noisy_model(5), Compute(), mesh)
        graphdef, state = create_state(model, optimizer, trainable_of(model), mesh, PPO.remembers)
        appraise = jax.jit(lambda batch: objective.appraise(InParts(model, micro), reference, batch, reused=True))
        columns = appraise(remembered(put(batch, mesh), state.memory))
        if not steps:
            return jax.tree.map(np.asarray, columns), {}, {}
        annotated = make_annotate(objective, graphdef)(state, columns)
        step = make_step(objective, graphdef, state, optimizer, schedule, max_grad_norm=None, num_micro_batches=micro)
        columns = jax.tree.map(np.asarray, columns)
        state, report = step(state, annotated)
    tally = Tally()
    tally.add(jax.device_get(report.metrics))
    return (
        columns,
        tally.values(),
        jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(merge(graphdef, state.params, state.frozen)))),
    )


EACH = [[0], [1], [2], [3]]
SOME = PPO(
    max_completion_length=6, missing_eos_penalty=0.4, reward_weights=[2.0, 1.0], whiten_rewards=True, entropy_coef=0.02
)


@pytest.fixture(scope="module")
def each():
    return updated(rows(EACH), objective=SOME)


@pytest.mark.parametrize(
    ("layout", "options", "changes"),
    [
        pytest.param([[3, 2, 0, 1]], {}, {"width": 64, "tail": 1}, id="packed, and padded with the end token"),
        pytest.param(EACH, {"devices": 2, "micro": 2}, {}, id="devices and micro-batches"),
    ],
)
def test_how_completions_are_laid_out_changes_nothing(each, layout, options, changes):
    _, metrics, weights = updated(rows(layout, **changes), objective=SOME, **options)
    for name, value in each[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    for one, other in zip(jax.tree.leaves(weights), jax.tree.leaves(each[2]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)


def test_scores_stand_where_the_last_token_has_been_read():
    plain = PPO(max_completion_length=6, missing_eos_penalty=0.4, kl_coef=0.0, gamma=0.9, lam=0.8)
    columns = updated(rows(EACH), objective=plain, steps=0)[0]
    for number, length in enumerate(LENGTHS):
        states = columns["states"][number] > 0
        has_room = length < 6
        assert states.nonzero()[0].tolist() == list(range(PROMPT - 1, PROMPT + length - 1 + has_room))
        values = columns["old_values"][number][states]
        score = 0.3 * number - 0.2 - 0.4 * (length == 6)
        rewards = [0.0] * (len(values) - 1) + [score]
        expected = np.array(advantages_of(rewards, values, 0.9, 0.8)) + values
        np.testing.assert_allclose(columns["returns"][number][states], expected, rtol=1e-5, atol=1e-6)


def test_what_nothing_is_known_of_is_not_trained_on(each):
    batch, other = rows(EACH), rows(EACH)
    for changed in (batch, other):
        changed["rewards"][1] = np.nan
    other["tokens"][1] = np.roll(other["tokens"][1], 1)
    other["ended"][1] = 1
    columns, metrics, weights = updated(batch, objective=SOME)
    assert not columns["states"][1].any() and not columns["token_advantages"][1].any()
    assert metrics["objective/scores"] != pytest.approx(each[1]["objective/scores"])
    assert np.isfinite(metrics["loss"])
    _, others, other_weights = updated(other, objective=SOME)
    for name in metrics.keys() - {"val/num_eos_tokens"}:
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-6, atol=1e-7, err_msg=name)
    for one, two in zip(jax.tree.leaves(weights), jax.tree.leaves(other_weights), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)


def test_only_the_value_model_moves_while_it_warms_up():
    start = nnx.to_pure_dict(nnx.state(on_trunk(make_noisy_model(0))))
    weights = updated(rows(EACH), objective=PPO(max_completion_length=6, value_warmup_steps=1), make=on_trunk)[2]
    for one, other in zip(jax.tree.leaves(weights["policy"]), jax.tree.leaves(start["policy"]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(weights["critic"]["head"]["kernel"]).max() > 0


def test_the_value_loss_reaches_the_policy_only_on_its_trunk():
    batch = {name: jnp.asarray(rows(EACH)[name]) for name in ("tokens", "positions", "segments")}
    for make in (on_trunk, as_copy):
        model = make(make_noisy_model(0))
        model.critic.head.kernel[...] = jnp.ones_like(model.critic.head.kernel[...])
        graphdef, weights = nnx.split(model)

        def total(weights, graphdef=graphdef):
            model = nnx.merge(graphdef, weights)
            return jnp.sum(model.values(model.hidden(**batch)[0], **batch)[0])

        slopes = nnx.to_pure_dict(jax.grad(total)(weights))
        assert any(np.any(x) for x in jax.tree.leaves(slopes["policy"])) == (make is on_trunk)
        assert all(np.any(x) for x in jax.tree.leaves(slopes["critic"]["head"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_kl": 0.0}, "target_kl is 0.0; it must be above 0"),
        ({"kl_coef": -0.1}, "kl_coef is -0.1; it must not be negative"),
        ({"vf_coef": -1.0}, "vf_coef is -1.0; it must not be negative"),
        ({"lam": 1.5}, "lam is 1.5; it must be from 0 to 1"),
        ({"cliprange": 0.0}, "cliprange is 0.0; it must be above 0"),
        ({"kl_estimator": "k2"}, "kl_estimator is 'k2'"),
        ({"adap_kl_ctrl": True, "kl_coef": 0.0}, "adap_kl_ctrl multiplies kl_coef, which is 0"),
        ({"reward_clip_range": [1.0, -1.0]}, "give the least reward and the greatest"),
    ],
)
def test_numbers_out_of_range_are_named(changes, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        PPO(**changes)


def test_models_share_what_they_can():
    policy = make_model()
    trunk, copy = on_trunk(policy), as_copy(policy)
    count = sum(x.size for x in jax.tree.leaves(nnx.state(policy)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(trunk))) == count + 32
    assert sum(x.size for x in jax.tree.leaves(nnx.state(copy))) == 2 * count + 32
