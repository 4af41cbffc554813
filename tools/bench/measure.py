"""What the benches share: the best rate of a few tries, and sides that run in processes of their own, in turn."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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


def in_turn(sides: Mapping[str, Sequence[str]], rounds: int, **options: Any) -> Iterator[tuple[str, Any]]:
    """Each side's name and what it says, one process at a time: every side once, and that `rounds` times."""
    for _ in range(rounds):
        for name, command in sides.items():
            yield name, said(command, **options)
