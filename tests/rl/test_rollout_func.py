"""Rollouts of the user's own: what they are given, and what they may return."""

import numpy as np
import pytest

from jaxpost.errors import ConfigError, RolloutError
from jaxpost.rl.generate import Completion
from jaxpost.rl.rewards import Scored
from jaxpost.rl.rollout_func import Limits, Policy, called, rollout_function
from jaxpost.rl.rows import GRAIN, Answers, rows_of

LIMITS = Limits(vocab_size=50, max_positions=12, eos_ids=[1])
GOOD = {
    "prompt_ids": [[5, 6], [5, 6], [7], [7]],
    "completion_ids": [[8, 9, 1], [8], [9, 9], [3, 1]],
    "logprobs": [[-1.0, -2.0, -0.5], [-1.0], [-1.0, -1.0], [-2.0, -0.1]],
}


def policy(num_generations=2):
    return Policy(lambda prompt: np.array([5, 6]), lambda *_, **__: [], None, None, num_generations, (0, 0))


def call(**changed):
    returned = {key: value for key, value in (GOOD | changed).items() if value is not ...}
    return called(lambda prompts, trainer: returned, ["a", "b"], policy(), LIMITS)


def test_what_is_returned_becomes_completions_and_columns():
    mask = [[1, 0, 1], [1], [1, 1], [1, 1]]
    logprobs = [[-1.0, float("nan"), -0.5], *GOOD["logprobs"][1:]]
    prompts, completions, columns = call(env_mask=mask, logprobs=logprobs, turns=[1, 2, 3, 4])
    assert [ids.tolist() for ids in prompts] == GOOD["prompt_ids"]
    assert completions[0] == Completion([8, 9, 1], [-1.0, 0.0, -0.5], True, [True, False, True])
    assert [completion.ended for completion in completions] == [True, False, False, True]
    assert [completion.num_own for completion in completions] == [2, 1, 2, 2]
    assert columns == {"turns": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logprobs": ...}, "returned no logprobs; it needs prompt_ids"),
        ({"completion_ids": [[8]]}, "completion_ids has 1 entries, but 2 prompts x num_generations 2 are 4"),
        ({"turns": 3}, "turns has no list entries"),
        ({"completion_ids": [[8, 9, 1], [], [9, 9], [3, 1]]}, "completion 2: completion_ids is empty"),
        ({"completion_ids": [[8, 9, 50], [8], [9, 9], [3, 1]]}, "completion 1: .* not from 0 to 49"),
        ({"logprobs": [[-1.0], [-1.0], [-1.0] * 2, [-1.0] * 2]}, "completion 1: logprobs has 1 entries for 3"),
        ({"logprobs": [[float("nan")] * 3, [-1.0], [-1.0] * 2, [-1.0] * 2]}, "completion 1: .* finite"),
        ({"prompt_ids": [[5] * 10, [5], [7], [7]]}, "completion 1: 10 \\+ 3 tokens; the model reads 12"),
        ({"env_mask": [[0, 0, 0], [1], [1, 1], [1, 1]]}, "completion 1: env_mask is 0 everywhere"),
        ({"logprobs": [[None] * 3, [-1.0], [-1.0] * 2, [-1.0] * 2]}, "completion 1: float"),
        ({"prompt_ids": [5, 6, 7, 8]}, "completion 1: 5 is no list of token ids"),
    ],
)
def test_what_is_no_rollout_is_named(changed, message):
    with pytest.raises(RolloutError, match=message):
        call(**changed)


def test_a_function_that_raises_or_returns_nothing_is_named():
    def broken(prompts, trainer):
        raise KeyError("tool")

    with pytest.raises(RolloutError, match="rollout_func broken: KeyError: 'tool'"):
        called(broken, ["a"], policy(), LIMITS)
    with pytest.raises(RolloutError, match="returned NoneType, not a dict"):
        called(lambda prompts, trainer: None, ["a"], policy(), LIMITS)


def test_functions_are_found_by_file(tmp_path):
    (tmp_path / "mine.py").write_text("def rollout(prompts, trainer):\n    return {}\n")
    assert rollout_function(f"{tmp_path}/mine.py:rollout")([], None) == {}
    for named, message in [
        ("mine", "give file.py:function"),
        (f"{tmp_path}/none.py:rollout", "of a file that exists"),
        (f"{tmp_path}/mine.py:other", "AttributeError"),
    ]:
        with pytest.raises(ConfigError, match=message):
            rollout_function(named)


def test_every_call_draws_other_numbers_and_a_resumed_run_the_same():
    class Args:
        max_completion_length = 4

    seeds = []

    def made(key):
        sample = lambda ids, seed, **_: seeds.append(seed) or []  # noqa: E731
        return Policy(lambda prompt: np.array([5]), sample, Args, None, 2, key)

    for key in ((0, 0), (0, 0), (0, 8)):
        trainer = made(key)
        trainer.generate([[5]])
        trainer.generate([[5]])
    assert seeds[:2] == seeds[2:4] and len(set(seeds)) == 4


@pytest.fixture
def dense(monkeypatch):
    """Rows without room between completions."""
    monkeypatch.setattr("jaxpost.rl.rows.GRAIN", 1)


def answered(numbers, prompts, completions):
    """Completions of prompts of these numbers, all rewarded with 0."""
    count = len(prompts)
    scored = Scored(np.zeros((count, 1), np.float32), np.zeros((count, 1), bool), {}, {}, [""])
    return Answers(numbers, [np.array(prompt) for prompt in prompts], completions, [None] * count, scored)


def laid_out(prompts, read=None):
    """Tokens, segments and positions of a row of completions [8] of these prompts."""
    count = len(prompts)
    answers = answered([0] * count, prompts, [Completion([8], [-1.0], False)] * count)
    rows = rows_of(answers, [list(range(count))], read or [True] * count, group_size=1, branches=True)
    real = rows["segments"][0] > 0
    return [rows[name][0][real].tolist() for name in ("tokens", "segments", "positions")]


@pytest.mark.usefixtures("dense")
def test_prompts_that_begin_alike_are_read_once_to_there():
    tokens, segments, positions = laid_out([[1, 2, 3, 4], [1, 2, 5], [6, 2, 5], [6, 7]])
    assert tokens == [1, 2, 3, 4, 8, 5, 8, 6, 2, 5, 8, 7, 8]
    assert segments == [1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4]
    assert positions == [0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 3, 1, 2]


@pytest.mark.usefixtures("dense")
def test_a_group_has_its_own_prompt_where_that_is_fewer_tokens():
    assert laid_out([[1, 2, 3], [1, 4, 5, 6], [1, 4, 5, 6]])[0] == [1, 2, 3, 8, 1, 4, 5, 6, 8, 6, 8]
    assert laid_out([[1, 2, 3], [1, 2, 4], [1, 2, 4]])[0] == [1, 2, 3, 8, 4, 8, 4, 8]


@pytest.mark.usefixtures("dense")
def test_what_is_not_read_is_no_trunk():
    assert laid_out([[1, 2, 3], [1, 2, 3], [1, 2, 4]], read=[False, True, True])[0] == [1, 2, 3, 8, 4, 8]


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("branches", [False, True])
def test_what_the_policy_was_told_is_read_and_not_trained_on(branches):
    told = Completion([8, 9, 1], [-1.0, 0.0, -0.5], True, [True, False, True])
    plain = Completion([8], [-1.0], False)
    answers = answered([0, 0, 1, 1], [[5, 6], [5, 6], [5, 6], [5, 6, 7]], [told, plain, plain, plain])
    rows = rows_of(answers, [[0, 1], [2, 3]], [True] * 4, group_size=2, branches=branches)
    starts = (2 if not branches else 1, 3)  # a branch begins with the last token of its prompt
    first = [5, 6, 8, 9, 1, *([6] if branches else [5, 6]), 8]
    assert rows["tokens"][0, : len(first)].tolist() == first
    trained = np.flatnonzero(rows["loss_mask"][0]).tolist()
    assert trained == [2, 4, 5 + starts[0]]
    # of prompts of a group that differ what they begin with is shared
    second = [5, 6, 8, *([7, 8] if branches else [5, 6, 7, 8])]
    assert rows["tokens"][1, : len(second)].tolist() == second
    assert rows["num_trained"].tolist() == [[2, 1], [1, 1]]
    assert rows["sampled_logps"][0, 1] == -1.0 and rows["sampled_logps"][0, 3] == -0.5


@pytest.mark.parametrize("branches", [False, True])
def test_tokens_stand_where_their_sums_are_those_of_the_sampler(branches):
    rng = np.random.default_rng(0)
    group, count = 4, 24
    common = rng.integers(2, 50, 9)
    prompts = [np.concatenate([common, rng.integers(2, 50, rng.integers(1, 9))]) for _ in range(count // group - 1)]
    prompts = [prompt for prompt in [*prompts, rng.integers(2, 50, 2)] for _ in range(group)]
    completions = [
        Completion(rng.integers(2, 50, size).tolist(), rng.normal(size=size).astype(np.float32).tolist(), True)
        for size in rng.integers(1, 9, count)
    ]
    answers = answered(list(range(count)), prompts, completions)
    read = (rng.random(count) < 0.8).tolist()
    rows = rows_of(answers, [list(range(count))], read, group_size=group, branches=branches)
    tokens, positions, segments = (rows[name][0] for name in ("tokens", "positions", "segments"))
    trunk = []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        at = np.flatnonzero(segments == number + 1)
        trained = at[rows["loss_mask"][0][at] > 0]
        if not read[number]:
            assert not len(trained)
            continue
        assert np.all((at - positions[at]) % GRAIN == 0)
        start = positions[at[0]]
        trunk = list(prompt) if not start else trunk
        text = [*trunk[:start], *tokens[at]]
        assert text[: len(prompt) + len(completion.tokens)] == [*prompt, *completion.tokens]
        assert len(text) < len(prompt) + len(completion.tokens) + GRAIN
        assert tokens[trained].tolist() == completion.tokens
        assert rows["sampled_logps"][0][trained - 1].tolist() == completion.logps
    assert np.any(positions[np.flatnonzero(np.diff(segments) > 0) + 1] > 0) == branches
