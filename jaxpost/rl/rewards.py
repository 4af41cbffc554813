"""Rewards of completions: functions by TRL's signature, each in a process of its own that has a deadline.

A function that raises, hangs, or returns what is no number costs those completions their reward, not the run its life:
they are left out of the mean that the others are compared with, counted and logged. Beyond a rate it is an error.
"""

import ast
import importlib.util
import inspect
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxpost.errors import ConfigError, RewardError
from jaxpost.options import nearest, option
from jaxpost.rl.builtin_rewards import FACTORIES, FUNCTIONS, accuracy_reward, builtin
from jaxpost.rl.reward_worker import Answer, Source, ask, describe, name_of

START_SECONDS = 300.0  # for a function's imports
LEAST_SECONDS = 1.0  # that a single completion is given


@dataclass(frozen=True, kw_only=True)
class RewardFunctionsConfig:
    """Which rewards there are, and how they may fail."""

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
        seconds: of each function.
    """

    rewards: np.ndarray
    failed: np.ndarray
    metrics: dict[str, list[float]]
    columns: dict[str, list[Any]]
    seconds: dict[str, float]


@runtime_checkable
class Runner(Protocol):
    """How a function is called."""

    def __call__(self, arguments: dict[str, Any], seconds: float) -> Answer:
        """What it says.

        Raises:
            Failure: it says nothing.
        """
        ...

    def close(self) -> None: ...


class Failure(Exception):
    """A function has raised, hung or died; the text says which."""


class Process:
    """A function in a process, which is killed when its time is over and started again for the next call."""

    def __init__(self, source: Source):
        self._source = source
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Any = None
        self._end: Callable[[], Any] = lambda: None

    def start(self) -> None:
        """Import the function, if that has not been done.

        Raises:
            Failure: that cannot be done.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._connection, theirs = Pipe()
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "jaxpost.rl.reward_worker", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        self._end = weakref.finalize(self, _end, self._process, self._connection)
        self._exchange(self._source, START_SECONDS)

    def __call__(self, arguments: dict[str, Any], seconds: float) -> Answer:
        self.start()
        return Answer(*self._exchange(arguments, seconds))

    def _exchange(self, message: Any, seconds: float) -> Any:
        try:
            self._connection.send(message)
            if not self._connection.poll(seconds):
                self.close()
                raise Failure(f"no answer within {seconds:.3g} seconds")
            is_fine, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            assert self._process is not None
            code = self._process.wait()
            self.close()
            raise Failure(f"its process ended with code {code}") from error
        if not is_fine:
            raise Failure(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        self._end()
        self._process = None


def _end(process: subprocess.Popen[bytes], connection: Any) -> None:
    process.kill()
    process.wait()
    connection.close()


class Thread:
    """A function that only this process has (a lambda, a method): one that hangs is left behind."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, arguments: dict[str, Any], seconds: float) -> Answer:
        answers: list[Answer] = []
        faults: list[str] = []

        def run() -> None:
            try:
                answers.append(ask(self._function, arguments))
            except Exception as error:
                faults.append(describe(error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise Failure(f"no answer within {seconds:.3g} seconds")
        if faults:
            raise Failure(faults[0])
        return answers[0]

    def close(self) -> None:
        """Nothing to end."""


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

    def __call__(self, arguments: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> Scored:
        """Score completions with all functions at once.

        Args:
            arguments: lists of N: prompts, completions, completion_ids and the columns of the dataset.
            rows: number of each completion's row in the dataset, for messages.

        Raises:
            RewardError: a function fails too often.
        """
        with ThreadPoolExecutor(len(self.names)) as pool:
            results = list(pool.map(lambda runner: self._score(runner, arguments, len(rows)), self._runners))
        for name, result in zip(self.names, results, strict=True):
            if np.mean(result.failed) > self._config.max_reward_failures:
                first = next(i for i in range(len(rows)) if result.failed[i])
                share = f"{int(np.sum(result.failed))} of {len(rows)} completions"
                raise RewardError(
                    f"reward function {name} fails for {share}; for row {rows[first] + 1}: {result.fault}"
                )
        return Scored(
            rewards=np.stack([result.values for result in results], axis=1),
            failed=np.stack([result.failed for result in results], axis=1),
            metrics={key: values for result in results for key, values in result.metrics.items()},
            columns={key: values for result in results for key, values in result.columns.items()},
            seconds={name: result.seconds for name, result in zip(self.names, results, strict=True)},
        )

    def close(self) -> None:
        """End the processes."""
        for runner in self._runners:
            runner.close()

    def _score(self, runner: Runner, arguments: Mapping[str, Sequence[Any]], count: int) -> "_Result":
        """All completions at once, or where that fails one by one, so that only those fail which are the cause."""
        began = time.perf_counter()
        try:
            answer = runner(dict(arguments), self._config.reward_timeout)
            values, failed, fault = _numbers(answer.values, count)
            return _Result(values, failed, fault, time.perf_counter() - began, answer.metrics, answer.columns)
        except Failure as failure:
            if count == 1:
                return _Result.failure(count, str(failure), time.perf_counter() - began)
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
        return _Result(values, failed, fault, time.perf_counter() - began, {}, {})


class _Result(NamedTuple):
    """Of one function."""

    values: np.ndarray
    failed: np.ndarray
    fault: str
    seconds: float
    metrics: dict[str, list[float]]
    columns: dict[str, list[Any]]

    @classmethod
    def failure(cls, count: int, fault: str, seconds: float) -> "_Result":
        return cls(np.full(count, np.nan, np.float32), np.ones(count, bool), fault, seconds, {}, {})


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
            raise ConfigError(f"reward_funcs: there is no file {path}")
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
