"""What the benches share: rates, sides that run in processes of their own in turn, how they compare, what is kept."""

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

TRIES, CALLS = 5, 4  # the best of so many, each of so many calls


def rate(amount: float, run: Callable[[], Any]) -> float:
    """Of the best of a few tries, a second; `run` makes CALLS calls, and `amount` is that of one."""
    run()
    times = []
    for _ in range(TRIES):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return CALLS * amount / min(times)


def said(command: Sequence[str], python: str = sys.executable, **options: Any) -> Any:
    """The JSON of the last line that a process prints.

    Args:
        command: a script and its arguments.
        python: the interpreter.
        options: of `subprocess.run`.

    Raises:
        CalledProcessError: the process failed.
    """
    done = subprocess.run([python, *command], check=True, stdout=subprocess.PIPE, text=True, **options)
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(
    sides: Mapping[str, Sequence[str]], rounds: int, pythons: Mapping[str, str] | None = None, **options: Any
) -> Iterator[tuple[str, Any]]:
    """Each side's name and what it says, one process at a time: every side once, and that `rounds` times.

    Args:
        sides: a script and its arguments, by name.
        rounds: how often each is run.
        pythons: the interpreters of those that have their own.
        options: of `subprocess.run`.
    """
    for _ in range(rounds):
        for name, command in sides.items():
            yield name, said(command, (pythons or {}).get(name, sys.executable), **options)


class Comparison(NamedTuple):
    """What sides reach, ours first.

    Attributes:
        values: of each side, of its runs.
        unit: of them.
        less_is_better: seconds, not speeds.
    """

    values: Mapping[str, Sequence[float]]
    unit: str
    less_is_better: bool = False

    @property
    def medians(self) -> dict[str, float]:
        """Of each side."""
        return {name: statistics.median(each) for name, each in self.values.items()}

    @property
    def ratios(self) -> dict[str, float]:
        """How many times better the first side is than each other one."""
        (_, ours), *others = self.medians.items()
        return {name: theirs / ours if self.less_is_better else ours / theirs for name, theirs in others}

    def __str__(self) -> str:
        """Medians with their spread, and the ratios."""

        def told(name: str, median: float) -> str:
            low, high = min(self.values[name]), max(self.values[name])
            return f"{name} {median:.4g}" + (f" ({low:.4g} to {high:.4g})" if len(self.values[name]) > 1 else "")

        sides = ", ".join(told(*side) for side in self.medians.items())
        ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in self.ratios.items())
        return f"{sides} {self.unit}" + (f": {ratios}" if ratios else "")


def store(output: str | None, what: str, figure: str, found: Mapping[str, Any]) -> None:
    """Print the figure of a bench, and write it with all that it is made of to a .json file, for `table.py`.

    Args:
        output: the file; None for none.
        what: was measured.
        figure: that it came to, in words.
        found: its numbers.
    """
    print(f"{what}: {figure}")
    if output is None:
        return
    row = {"what": what, "figure": figure, "command": command(), "machine": machine()}
    row |= {"date": datetime.date.today().isoformat(), "versions": versions()}
    Path(output).write_text(json.dumps(row | dict(found), indent=1) + "\n", encoding="utf-8")


def command() -> str:
    """That of this process, with the names of files alone and without where it writes."""
    words = [Path(word).name if os.sep in word and Path(word).exists() else word for word in sys.argv[1:]]
    if "--output" in words:
        at = words.index("--output")
        del words[at : at + 2]
    return shlex.join(["python", f"tools/bench/{Path(sys.argv[0]).name}", *words])


def machine() -> str:
    """Its processor and how much of it is ours, or its accelerators."""
    try:
        names = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return ", ".join(subprocess.run(names, check=True, capture_output=True, text=True).stdout.splitlines())
    except (OSError, subprocess.CalledProcessError):
        pass
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} cores of {name or platform.machine()}"


def versions() -> dict[str, str]:
    """Of the packages that figures depend on, where they are installed here."""
    found = {}
    for name in ("jax", "flax", "torch", "transformers", "trl", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
