"""The queue and the slots: what is drawn does not depend on what is drawn beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.rl.generate import LEAST_SLOTS, bucket, generate, room
from jaxpost.rl.sampling import Sampling
from jaxpost.rl.slots import programs
from jaxpost.sharding import make_mesh
from tests.conftest import make_model

PROMPTS = [np.arange(3, 3 + length) for length in (5, 2, 9, 17)]
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return make_model()


def logp_of(model, tokens, token):
    scores = np.asarray(jax.nn.log_softmax(model(jnp.asarray([tokens]))[0, -1]))
    return scores, scores[token]


def test_greedy_equals_a_forward_pass_per_token(model):
    completions = generate(model, PROMPTS[:3], max_new_tokens=6, eos_ids=[], sampling=GREEDY, batch_size=2)
    for prompt, completion in zip(PROMPTS, completions, strict=False):
        tokens = list(prompt)
        for token, logp in zip(completion.tokens, completion.logps, strict=True):
            scores, expected = logp_of(model, tokens, token)
            assert token == scores.argmax()
            assert logp == pytest.approx(expected, abs=1e-5)
            tokens.append(token)


@pytest.fixture(scope="module")
def drawn(model):
    """Three completions of each prompt; some end early."""
    return generate(model, PROMPTS, max_new_tokens=40, eos_ids=range(8), num_return_sequences=3, batch_size=12, seed=3)


def test_the_log_probabilities_are_those_of_a_forward_pass(model, drawn):
    for number, completion in enumerate(drawn[::5]):
        prompt = PROMPTS[number * 5 // 3]
        logits = model(jnp.asarray([[*prompt, *completion.tokens]]))[0, len(prompt) - 1 : -1]
        expected = jax.nn.log_softmax(logits)[jnp.arange(len(completion.tokens)), jnp.asarray(completion.tokens)]
        np.testing.assert_allclose(completion.logps, expected, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_refilled_slots_draw_what_slots_of_their_own_would(model, drawn, batch_size):
    again = generate(
        model, PROMPTS, max_new_tokens=40, eos_ids=range(8), num_return_sequences=3, batch_size=batch_size, seed=3
    )
    assert len({len(completion.tokens) for completion in drawn}) > 4 > LEAST_SLOTS - 1
    assert [completion.tokens for completion in again] == [completion.tokens for completion in drawn]
    for ours, theirs in zip(again, drawn, strict=True):
        np.testing.assert_allclose(ours.logps, theirs.logps, atol=1e-5)


def test_devices_share_the_slots(model, drawn):
    with jax.set_mesh(make_mesh("data=2,fsdp=2,tensor=2")):
        again = generate(
            model, PROMPTS, max_new_tokens=40, eos_ids=range(8), num_return_sequences=3, batch_size=8, seed=3
        )
    assert [completion.tokens for completion in again] == [completion.tokens for completion in drawn]


def test_a_later_part_of_the_requests_is_as_in_the_whole(model, drawn):
    part = generate(
        model,
        PROMPTS[2:],
        max_new_tokens=40,
        eos_ids=range(8),
        num_return_sequences=3,
        batch_size=12,
        seed=3,
        first_request=6,
    )
    assert [completion.tokens for completion in part] == [completion.tokens for completion in drawn[6:]]


def test_completions_of_a_prompt_differ_and_another_seed_draws_others(model, drawn):
    assert len({tuple(completion.tokens) for completion in drawn}) == len(drawn)
    others = generate(
        model, PROMPTS, max_new_tokens=40, eos_ids=range(8), num_return_sequences=3, batch_size=12, seed=4
    )
    assert all(a.tokens != b.tokens for a, b in zip(others, drawn, strict=True))


def test_end_token_ends_and_is_kept(model):
    free = generate(model, PROMPTS[:1], max_new_tokens=6, eos_ids=[], sampling=GREEDY)[0]
    cut = generate(model, PROMPTS[:1], max_new_tokens=6, eos_ids=[free.tokens[2]], sampling=GREEDY)[0]
    assert cut.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]
    assert cut.ended
    assert not free.ended


def test_what_else_ends_a_completion(model):
    options = {"max_new_tokens": 40, "eos_ids": [], "num_return_sequences": 3, "seed": 1}
    free = generate(model, PROMPTS, **options)
    cut = generate(model, PROMPTS, stop=lambda tokens: 20 if len(tokens) >= 20 else None, **options)
    assert all(completion.ended for completion in cut)
    assert [completion.tokens for completion in cut] == [completion.tokens[:20] for completion in free]
    assert all(len(completion.logps) == 20 for completion in cut)


def test_one_program_serves_prompts_that_come_one_by_one_and_what_ends_one_is_asked_for_often(model):
    options = {"max_new_tokens": 20, "eos_ids": [], "seed": 1}
    free = [generate(model, [prompt], **options)[0] for prompt in PROMPTS]
    seen, made = [], programs.cache_info().misses
    one_by_one = [
        generate(model, [prompt], roomy=True, stop=lambda tokens: seen.append(len(tokens)), stop_steps=3, **options)[0]
        for prompt in PROMPTS
    ]
    assert programs.cache_info().misses == made + 1
    assert [completion.tokens for completion in one_by_one] == [completion.tokens for completion in free]
    assert seen == [3, 6, 9, 12, 15, 18, 20] * len(PROMPTS)
    assert [room(length) for length in (1, 256, 257, 1024)] == [256, 256, 512, 1024]


def test_nothing_to_complete_is_nothing(model):
    assert generate(model, [], max_new_tokens=4, eos_ids=[]) == []


def test_lengths_are_padded_a_little():
    lengths = np.arange(17, 1025)
    padded = np.array([bucket(int(length)) for length in lengths])
    assert np.all(padded >= lengths) and len(set(padded)) == 22
    assert np.max(padded / lengths) < 1.42 and np.mean(padded / lengths) < 1.1


def test_a_cache_that_grows_and_completions_with_limits_of_their_own(model):
    options = {"eos_ids": [], "num_return_sequences": 2, "seed": 5}
    limits = [150, 3, 70, 120]
    drawn = generate(model, PROMPTS, max_new_tokens=150, limits=limits, **options)
    assert [len(completion.tokens) for completion in drawn] == [limit for limit in limits for _ in range(2)]
    assert not any(completion.ended for completion in drawn)
    for number in (0, 7):
        prompt, completion = PROMPTS[number // 2], drawn[number]
        logits = model(jnp.asarray([[*prompt, *completion.tokens]]))[0, len(prompt) - 1 : -1]
        expected = jax.nn.log_softmax(logits)[jnp.arange(len(completion.tokens)), jnp.asarray(completion.tokens)]
        np.testing.assert_allclose(completion.logps, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"limits": [4, 4]}, "limits must be 4 numbers"),
        ({"limits": [4, 4, 5, 4]}, "from 1 to 4"),
        ({"prompts": [np.array([3]), np.array([], int)]}, "prompt 1 is empty"),
    ],
)
def test_bad_arguments_are_named(model, changes, message):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 4, "eos_ids": [1], **changes}
    with pytest.raises(ConfigError, match=message):
        generate(model, **arguments)
