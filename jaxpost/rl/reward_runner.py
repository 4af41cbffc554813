"""How a reward function is called: in a process of its own, or in a thread of this one, and not for ever."""

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any, Protocol, runtime_checkable

from jaxpost.rl.reward_worker import Answer, Source, ask, describe

START_SECONDS = 300.0  # for a function's imports


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
