"""What a run is doing, how long it may, and whether it has been told to stop.

A scheduler that takes a machine away sends SIGTERM and some seconds later SIGKILL. The run is told by `check`, which
long work calls now and then, and saves what it has. What would lose nothing, a second signal, and what does not come to
an end in time is ended here, by a thread: the others may be waiting for the compiler or a device.

This is about the process, as signals are, so there is one of it.
"""

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from jaxpost.errors import ConfigError, PreemptedError
from jaxpost.options import Group, nearest, option

PREEMPTED, STUCK = PreemptedError.exit_code, 76
GRACE_SECONDS = 25.0  # Kubernetes, TPU VMs and most Slurm sites give 30
LOOK_SECONDS = 0.2
LIMITS = {  # seconds
    "compile": 3600.0,  # up to the end of the first step
    "train": 1800.0,  # a step
    "evaluate": 14400.0,
    "generate": 7200.0,
    "score": 3600.0,
    "save": 3600.0,
}


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """How long a run may be busy with one thing."""

    help_group = Group.DEVICES

    phase_timeouts: dict | None = option(
        None,
        f"Seconds after which a run counts as stuck and ends with code {STUCK}, by phase; by default "
        + ", ".join(f"{name} {seconds:g}" for name, seconds in LIMITS.items())
        + ".",
        may_change=True,
    )

    def __post_init__(self) -> None:
        for name, seconds in (self.phase_timeouts or {}).items():
            if name not in LIMITS:
                raise ConfigError(f"phase_timeouts: no phase {name!r}{nearest(name, LIMITS)}; {', '.join(LIMITS)}")
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
                raise ConfigError(f"phase_timeouts: {name} is {seconds!r}; it takes seconds above 0")

    def limits(self) -> dict[str, float]:
        """Seconds of each phase."""
        return LIMITS | (self.phase_timeouts or {})


class _Watch(threading.Thread):
    """Looks after one run.

    Attributes:
        phase: what the run is doing; None for what has no limit, and nothing to save.
        since: when that began.
        told: when it was told to stop.
    """

    def __init__(self, limits: Mapping[str, float]):
        super().__init__(name="watch", daemon=True)
        self._limits = limits
        self._ends = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)
        self.phase: str | None = None
        self.since = time.monotonic()
        self.told: float | None = None

    @property
    def signals(self) -> int:
        """The file that the number of every signal is written to."""
        return self._ends[1].fileno()

    def run(self) -> None:
        ears = self._ends[0]
        while True:
            if select.select([ears], [], [], LOOK_SECONDS)[0]:
                heard = ears.recv(64)
                if not heard:
                    return
                self._hear(heard.count(signal.SIGTERM))
            now, phase = time.monotonic(), self.phase
            if self.told is not None and now - self.told > GRACE_SECONDS:
                _leave(PREEMPTED, f"told to stop, and {phase} takes too long; continue from the last checkpoint")
            if phase is not None and now - self.since > self._limits[phase]:
                faulthandler.dump_traceback(sys.__stderr__ or 2)
                _leave(STUCK, f"stuck in {phase} for more than {self._limits[phase]:g} seconds; where: see above")

    def _hear(self, times: int) -> None:
        if times and (times > 1 or self.told is not None):
            _leave(PREEMPTED, "told to stop again; continue from the last checkpoint")
        if times:
            self.told = time.monotonic()
            if self.phase in (None, "compile"):
                _leave(PREEMPTED, "told to stop with nothing new to save; give the same command again")

    def close(self) -> None:
        self._ends[1].close()
        self.join()
        self._ends[0].close()


_watch: _Watch | None = None


@contextmanager
def watching(config: WatchConfig, *, listens: bool = True) -> Iterator[None]:
    """Look after a run: its phases, and SIGTERM.

    Args:
        config: how long phases may last.
        listens: whether SIGTERM is ours; with several processes it is JAX's, which tells all of them.
    """
    global _watch
    outer, _watch = _watch, _Watch(config.limits())
    _watch.start()
    try:
        with _signals_to(_watch.signals) if listens else nullcontext():
            yield
    finally:
        _watch.close()
        _watch = outer


@contextmanager
def _signals_to(file: int) -> Iterator[None]:
    """Write the number of each signal to a file, at once, whatever the main thread is waiting for."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be taken over
        yield
        return
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    before = signal.set_wakeup_fd(file, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say that the block is this phase, of LIMITS; what it is in begins anew after it."""
    assert name in LIMITS
    watch = _watch
    if watch is None:
        yield
        return
    outer = watch.phase
    watch.phase, watch.since = name, time.monotonic()
    try:
        yield
    finally:
        watch.phase, watch.since = outer, time.monotonic()


def is_told() -> bool:
    """Whether the run has been told to stop."""
    return _watch is not None and _watch.told is not None


def check() -> None:
    """Called now and then by what takes long and can be done again.

    Raises:
        PreemptedError: the run has been told to stop.
    """
    if is_told():
        raise PreemptedError("told to stop")


def _leave(code: int, why: str) -> None:
    """End the process, whatever its other threads are waiting for."""
    os.write(2, f"jaxpost: {why}\n".encode())
    os._exit(code)
