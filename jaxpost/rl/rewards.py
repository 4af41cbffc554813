"""Rewards of completions: functions by TRL's signature, each in a process of its own that has a deadline.

A function that raises, hangs, or returns what is no number costs those completions their reward, not the run its life:
they are left out of the mean that the others are compared with, counted and logged. Beyond a rate it is an error.

Of several processes each has functions of its own, which see its share of a generation: whole groups of a prompt.
"""

import ast
import importlib.util
import inspect
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpost.errors import ConfigError, RewardError
from jaxpost.options import Group, nearest, option
from jaxpost.rl.builtin_rewards import FACTORIES, FUNCTIONS, accuracy_reward, builtin
from jaxpost.rl.reward_runner import Failure, Process, Runner, Thread
from jaxpost.rl.reward_worker import Source, name_of

LEAST_SECONDS = 1.0  # that a single completion is given


@dataclass(frozen=True, kw_only=True)
class RewardFunctionsConfig:
    """Which rewards there are, and how they may fail."""

    help_group = Group.REWARDS

    reward_funcs: list[str] | None = option(
        None, f"Rewards: file.py:function, or built in: {', '.join((*FUNCTIONS, *FACTORIES))}; name(option=value)."
    )
    reward_timeout: float = option(
        60.0, "Seconds that a reward function has for the completions of one generation.", may_change=True
    )
    max_reward_failures: float = option(
        0.5,
        "Stop the run when a function fails for more than this share of a generation's completions.",
        may_change=True,
    )

    def __post_init__(self) -> None:
        if self.reward_timeout <= 0:
            raise ConfigError(f"reward_timeout is {self.reward_timeout}; it must be above 0")
        if not 0 <= self.max_reward_failures <= 1:
            raise ConfigError(f"max_reward_failures is {self.max_reward_failures}; it must be from 0 to 1")


class Scored(NamedTuple):
    """What the functions say of N completions.

    Attributes:
        rewards: float32 [N, F]; NaN where there is none.
        failed: bool [N, F]; where that was the function's fault. None is not one.
        metrics: what functions logged.
        columns: likewise, one entry a completion.
        faults: what went wrong, of each function; empty where nothing did.
    """

    rewards: np.ndarray
    failed: np.ndarray
    metrics: dict[str, list[float]]
    columns: dict[str, list[Any]]
    faults: list[str]

    @classmethod
    def joined(cls, parts: Sequence["Scored"]) -> "Scored":
        """What is said of the completions of all parts, one part after the other.

        A part of which a column says nothing, of no completions say, has None there.
        """
        metrics: dict[str, list[float]] = {}
        columns: dict[str, list[Any]] = {name: [] for part in parts for name in part.columns}
        for part in parts:
            for name, values in part.metrics.items():
                metrics.setdefault(name, []).extend(values)
            for name, values in columns.items():
                values += part.columns.get(name, [None] * len(part.rewards))
        return cls(
            np.concatenate([part.rewards for part in parts]),
            np.concatenate([part.failed for part in parts]),
            metrics,
            columns,
            [next(filter(None, faults), "") for faults in zip(*(part.faults for part in parts), strict=True)],
        )


class Rewards:
    """Reward functions with their names.

    Args:
        functions: names, or functions.
        config: how they may fail.

    Attributes:
        names: of the functions, in order.

    Raises:
        ConfigError: there is none, there is no such function, or two have the same name.
    """

    def __init__(self, functions: Sequence[str | Callable[..., Any]], config: RewardFunctionsConfig):
        if not functions:
            raise ConfigError("there is nothing to learn from: give --reward_funcs")
        self._config = config
        named = [_named(function) for function in functions]
        self.names = [name for name, _ in named]
        for name in self.names:
            if self.names.count(name) > 1:
                raise ConfigError(f"reward_funcs: there are {self.names.count(name)} functions named {name}")
        self._runners = [runner for _, runner in named]
        for name, runner in named:
            if isinstance(runner, Process):
                try:
                    runner.start()
                except Failure as failure:
                    self.close()
                    raise ConfigError(f"reward_funcs: {name} cannot be loaded ({failure})") from failure

    def __call__(self, arguments: Mapping[str, Sequence[Any]], count: int) -> Scored:
        """Score so many completions with all functions at once.

        `arguments` are lists of as many: prompts, completions, completion_ids and the columns of the dataset.
        """
        with ThreadPoolExecutor(len(self.names)) as pool:
            results = list(pool.map(lambda runner: self._score(runner, arguments, count), self._runners))
        return Scored(
            rewards=np.stack([result.values for result in results], axis=1),
            failed=np.stack([result.failed for result in results], axis=1),
            metrics={key: values for result in results for key, values in result.metrics.items()},
            columns={key: values for result in results for key, values in result.columns.items()},
            faults=[result.fault for result in results],
        )

    def check(self, scored: Scored, rows: Sequence[int]) -> None:
        """Whether the functions may go on.

        Args:
            scored: what they have said of a generation.
            rows: number of each completion's row in the dataset, for messages.

        Raises:
            RewardError: one fails too often, or has logged a column that is not one entry a completion.
        """
        for name, values in scored.columns.items():
            if len(values) != len(rows):
                raise RewardError(f"log_extra: column {name} has {len(values)} values for {len(rows)} completions")
        for name, failed, fault in zip(self.names, scored.failed.T, scored.faults, strict=True):
            if np.mean(failed) > self._config.max_reward_failures:
                share = f"{int(np.sum(failed))} of {len(rows)} completions"
                first = rows[int(np.argmax(failed))]
                raise RewardError(f"reward function {name} fails for {share}; for row {first + 1}: {fault}")

    def close(self) -> None:
        """End the processes."""
        for runner in self._runners:
            runner.close()

    def _score(self, runner: Runner, arguments: Mapping[str, Sequence[Any]], count: int) -> "_Result":
        """All completions at once, or where that fails one by one, so that only those fail which are the cause."""
        if count == 0:
            return _Result.failure(0, "")
        try:
            answer = runner(dict(arguments), self._config.reward_timeout)
            values, failed, fault = _numbers(answer.values, count)
            return _Result(values, failed, fault, answer.metrics, answer.columns)
        except Failure as failure:
            if count == 1:
                return _Result.failure(count, str(failure))
            fault = str(failure)
        seconds = max(LEAST_SECONDS, self._config.reward_timeout / count)
        deadline = time.perf_counter() + 2 * self._config.reward_timeout
        values, failed = np.full(count, np.nan, np.float32), np.ones(count, bool)
        for i in range(count):
            if time.perf_counter() > deadline:
                break
            try:
                answer = runner({name: [column[i]] for name, column in arguments.items()}, seconds)
            except Failure as failure:
                fault = str(failure)
                continue
            one, wrong, text = _numbers(answer.values, 1)
            values[i], failed[i], fault = one[0], wrong[0], text or fault
        return _Result(values, failed, fault, {}, {})


class _Result(NamedTuple):
    """Of one function."""

    values: np.ndarray
    failed: np.ndarray
    fault: str
    metrics: dict[str, list[float]]
    columns: dict[str, list[Any]]

    @classmethod
    def failure(cls, count: int, fault: str) -> "_Result":
        return cls(np.full(count, np.nan, np.float32), np.ones(count, bool), fault, {}, {})


def _numbers(values: Any, count: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Rewards, where there is none by the function's fault, and what that is."""
    rewards, failed = np.full(count, np.nan, np.float32), np.zeros(count, bool)
    if not isinstance(values, list):
        return rewards, ~failed, f"it returned {type(values).__name__}, not a list of numbers"
    if len(values) != count:
        return rewards, ~failed, f"it returned {len(values)} values for {count} completions"
    fault = ""
    for i, value in enumerate(values):
        if value is None:
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            rewards[i] = number
        else:
            failed[i], fault = True, fault or f"it returned {value!r}"
    return rewards, failed, fault


def _named(function: str | Callable[..., Any]) -> tuple[str, Runner]:
    """A function's name, and how it is run.

    Raises:
        ConfigError: there is no such function.
    """
    if isinstance(function, str):
        return _by_name(function)
    name = name_of(function)
    module, place = getattr(function, "__module__", None), getattr(function, "__qualname__", "<")
    # What `__main__` defines cannot be imported without running it again.
    if module in (None, "__main__", "builtins") or "<" in place or not inspect.isfunction(function):
        return name, Thread(function)
    return name, Process(Source("module", str(module), place, {}, sys.path))


def _by_name(text: str) -> tuple[str, Runner]:
    path, colon, name = text.rpartition(":")
    if colon and path.endswith(".py"):
        if not Path(path).is_file():
            raise ConfigError(f"reward_funcs: there is no file {path}; give file.py:function")
        return name, Process(Source("file", str(Path(path).resolve()), name, {}, []))
    name, options = _options(text)
    known = (*FUNCTIONS, *FACTORIES)
    if name not in known:
        hint = nearest(name, known)
        raise ConfigError(
            f"reward_funcs: no function {name!r}{hint}; give file.py:function, or one of {', '.join(known)}"
        )
    if name == accuracy_reward.__name__ and importlib.util.find_spec("math_verify") is None:
        raise ConfigError("reward_funcs: accuracy_reward needs math-verify: pip install jaxpost[math]")
    try:
        builtin(name, options)
    except TypeError as error:
        raise ConfigError(f"reward_funcs: {text}: {error}") from error
    return name, Process(Source("builtin", "", name, options, []))


def _options(text: str) -> tuple[str, dict[str, Any]]:
    """`name(key=value, ...)` taken apart.

    Raises:
        ConfigError: it is not of that form.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return call.func.id, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"reward_funcs: {text!r} is not of the form name(option=value)") from error
    return text, {}
