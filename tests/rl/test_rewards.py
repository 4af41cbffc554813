"""Reward functions that do what they should, and those that raise, hang, die or return what is no number."""

import itertools

import numpy as np
import pytest

from jaxpost.errors import ConfigError, RewardError
from jaxpost.rl.builtin_rewards import FACTORIES, FUNCTIONS, last_number
from jaxpost.rl.rewards import RewardFunctionsConfig, Rewards, Scored

TEXTS = ["1", "two", "3 and 4", "", "-5.5", "6,000"]
ROWS = list(range(10, 16))
SOURCE = """
import asyncio, os, time
import numpy as np

def lengths(completions, **kwargs):
    print("a function may print")
    return np.array([len(text) for text in completions])

async def later(completions, extra):
    await asyncio.sleep(0.01)
    return [value * 2 for value in extra]

def logs(completions, log_metric, log_extra, **kwargs):
    log_metric("words", 3.0)
    log_extra("first", [text[:1] for text in completions])
    return [0.0] * len(completions)

def some(completions, **kwargs):
    return [None if text == "" else float("nan") if text == "two" else 1.0 for text in completions]

def raises_at_two(completions, **kwargs):
    if "two" in completions:
        raise ValueError("no two")
    return [1.0] * len(completions)

def hangs_at_two(completions, **kwargs):
    if "two" in completions:
        time.sleep(600)
    return [1.0] * len(completions)

def dies_at_two(completions, **kwargs):
    if "two" in completions:
        os._exit(3)
    return [1.0] * len(completions)

def always_raises(completions, **kwargs):
    raise RuntimeError("not today")

def too_few(completions, **kwargs):
    return [1.0] * (len(completions) + 1)

def text(completions, **kwargs):
    return "good"

def logs_too_much(completions, log_extra, **kwargs):
    log_extra("letters", "".join(completions))
    return [0.0] * len(completions)

def words(completions, **kwargs):
    return ["good"] * len(completions)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def rewards(file):
    """Makes Rewards of functions of the file, by name."""
    made = []

    def make(*names, **config):
        config = {"reward_timeout": 5.0, **config}
        made.append(Rewards([f"{file}:{name}" for name in names], RewardFunctionsConfig(**config)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def arguments():
    return {"prompts": ["?"] * 6, "completions": TEXTS, "completion_ids": [[1]] * 6, "extra": list(range(6))}


def test_functions_of_a_file_sync_and_async_with_columns_and_logs(rewards):
    scored = rewards("lengths", "later", "logs")(arguments(), len(ROWS))
    assert scored.rewards.tolist() == [[len(text), 2 * i, 0] for i, text in enumerate(TEXTS)]
    assert not scored.failed.any()
    assert scored.metrics == {"words": [3.0]} and scored.columns == {"first": ["1", "t", "3", "", "-", "6"]}


def test_none_is_no_reward_and_nan_is_a_fault(rewards):
    scored = rewards("some")(arguments(), len(ROWS))
    assert np.isnan(scored.rewards[:, 0]).tolist() == [False, True, False, True, False, False]
    assert scored.failed[:, 0].tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("name", ["raises_at_two", "hangs_at_two", "dies_at_two"])
def test_only_the_completion_that_is_the_cause_loses_its_reward(rewards, name):
    functions = rewards(name, reward_timeout=2.0)
    for _ in range(2):  # a process that was killed is started again
        scored = functions(arguments(), len(ROWS))
        assert scored.failed[:, 0].tolist() == [False, True, False, False, False, False]
        assert np.nansum(scored.rewards) == 5


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("always_raises", "RuntimeError: not today"),
        ("too_few", "it returned 7 values for 6 completions"),
        ("text", "it returned str, not a list of numbers"),
        ("words", "it returned 'good'"),
    ],
)
def test_failing_too_often_ends_the_run_with_name_and_row(rewards, name, fault):
    functions = rewards(name)
    scored = functions(arguments(), len(ROWS))
    with pytest.raises(RewardError, match=f"reward function {name} fails for 6 of 6 completions; for row 11: {fault}"):
        functions.check(scored, ROWS)
    assert scored.failed.all()
    rewards(name, max_reward_failures=1.0).check(scored, ROWS)


def test_a_column_that_does_not_fit_is_named(rewards):
    functions = rewards("logs_too_much")
    with pytest.raises(RewardError, match="log_extra: column letters has 20 values for 6 completions"):
        functions.check(functions(arguments(), len(ROWS)), ROWS)


def test_the_shares_of_several_processes_are_one_whole(rewards):
    functions = rewards("lengths", "logs", "raises_at_two", max_reward_failures=0.2)
    bounds = (0, 2, 2, 6)
    parts = [
        functions({name: values[a:b] for name, values in arguments().items()}, b - a)
        for a, b in itertools.pairwise(bounds)
    ]
    found, whole = Scored.joined(parts), functions(arguments(), len(ROWS))
    np.testing.assert_array_equal(found.rewards, whole.rewards)
    np.testing.assert_array_equal(found.failed, whole.failed)
    assert found.columns == whole.columns and found.metrics == {"words": [3.0, 3.0]}
    assert found.faults == ["", "", "ValueError: no two"]
    functions.check(found, ROWS)  # a third of the first share, a sixth of all


def test_functions_of_this_process():
    def slow(completions, **_):
        import time

        time.sleep(0.5 if len(completions) > 1 else 0)
        return [2.0] * len(completions)

    config = RewardFunctionsConfig(reward_timeout=0.2)
    scored = Rewards([slow, lambda completions: [len(text) for text in completions]], config)(arguments(), len(ROWS))
    assert scored.rewards.tolist() == [[2, len(text)] for text in TEXTS]


def test_a_function_of_a_module_is_imported_in_a_process_of_its_own():
    functions = Rewards([last_digit], RewardFunctionsConfig())
    assert functions(arguments(), len(ROWS)).rewards[:, 0].tolist() == [1, -1, 4, -1, 5, 0]
    functions.close()


def last_digit(completions, **_):
    """A reward that other modules can import."""
    return [int(text[-1]) if text[-1:].isdigit() else -1 for text in completions]


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([], "there is nothing to learn from"),
        (["nowhere.py:f"], "there is no file nowhere.py"),
        (["numeric_anser"], "no function 'numeric_anser' \\(did you mean 'numeric_answer'\\?\\)"),
        (["length_reward(per_word=1)"], "unexpected keyword argument 'per_word'"),
        (["numeric_answer(x=1)"], "numeric_answer takes no options"),
        (["length_reward("], "not of the form name\\(option=value\\)"),
        (["numeric_answer", "numeric_answer"], "there are 2 functions named numeric_answer"),
    ],
)
def test_mistakes_are_named(functions, message):
    with pytest.raises(ConfigError, match=message):
        Rewards(functions, RewardFunctionsConfig())


def test_a_function_that_the_file_lacks_is_named(file):
    with pytest.raises(ConfigError, match=r"missing cannot be loaded \(AttributeError: .*no attribute 'missing'"):
        Rewards([f"{file}:missing"], RewardFunctionsConfig())


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4 = 7.", 7), ("-2", -2), ("1,234.5 apples", 1234.5), ("none", None), ("#### 18", 18), ("x = .5", 0.5)],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


def test_built_in_functions():
    said = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    assert FUNCTIONS["numeric_answer"]([said("It is 7"), "8", "no"], ["#### 7", "9", "none"]) == [1, 0, None]
    assert FUNCTIONS["exact_answer"]([said(" yes\n"), "no"], ["yes", "yes"]) == [1, 0]
    thoughts = ["<think>a</think>b", "<think>a<think>b</think>", "a <think>b</think>", "<think>\na\n</think>\nb"]
    assert FUNCTIONS["think_format_reward"](thoughts) == [1, 0, 0, 1]


def test_built_in_functions_with_options_equal_trl():
    rewards = pytest.importorskip("trl.rewards")
    ids = [[5] * 90, [1, 2, 3, 4], [1] * 101, [2], [1, 2, 3, 1, 2, 3, 1, 2, 3]]
    ours = FACTORIES["soft_overlong_punishment"](max_completion_len=100, soft_punish_cache=20)
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert ours(ids) == theirs(ids)
    assert FACTORIES["repetition_penalty_reward"](2)(ids) == rewards.get_repetition_penalty_reward(2)(ids)
    assert FACTORIES["length_reward"](per_token=-0.5)(ids) == [-45, -2, -50.5, -0.5, -4.5]
