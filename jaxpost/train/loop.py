"""The loop: the one place where steps follow each other. It knows no objective, model or dataset by name."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from jaxpost.errors import ConfigError, NonFiniteError
from jaxpost.metrics import Metric, Tally, loss_of
from jaxpost.objectives.base import Batch
from jaxpost.options import option
from jaxpost.train.state import TrainState
from jaxpost.train.step import StepReport

MAX_NONFINITE = 5


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train."""

    num_train_epochs: float = option(3.0, "Passes over the data; max_steps overrides it.")
    max_steps: int = option(-1, "Optimizer steps; -1 to go by num_train_epochs.")
    seed: int = option(42, "Seed of everything random in the run.")

    def __post_init__(self) -> None:
        if self.max_steps < 1 and self.max_steps != -1:
            raise ConfigError(f"max_steps is {self.max_steps}; it must be at least 1, or -1 to go by num_train_epochs")
        if self.num_train_epochs <= 0:
            raise ConfigError(f"num_train_epochs is {self.num_train_epochs}; it must be above 0")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)


@runtime_checkable
class Log(Protocol):
    """What the loop tells the world; see `train.logging.RunLog`."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def progress(self, step: int, loss: float | None, tokens_per_second: float | None) -> None: ...


@runtime_checkable
class Fed(Protocol):
    """What a source gives for a step.

    Attributes:
        batch: on the devices.
        metrics: of the batch, that the step does not know of.
        times: seconds that the source has spent on it, by purpose; what else it took counts as waiting for input.
    """

    @property
    def batch(self) -> Batch: ...

    @property
    def metrics(self) -> Mapping[str, Metric]: ...

    @property
    def times(self) -> Mapping[str, float]: ...


@runtime_checkable
class Source(Protocol):
    """Gives the batch of each step; an online one makes it with the state.

    Attributes:
        ahead: it does not wait for the state, so that the device is still busy with the step before.
    """

    @property
    def ahead(self) -> bool: ...

    def __call__(self, state: TrainState, /) -> Fed: ...

    def kept(self) -> Sequence[Batch]:
        """What a checkpoint must keep of the batches of the steps to come; none where they can be made again."""
        ...


class Pending(NamedTuple):
    """A step that the device may still be working on.

    Attributes:
        report: of the step.
        metrics: of its batch.
    """

    report: StepReport
    metrics: Mapping[str, Metric]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which steps do what; None for never."""

    total_steps: int
    steps_per_epoch: int
    log_every: int
    log_first: bool = False
    evaluate_first: bool = False
    evaluate_every: int | None = None
    save_every: int | None = None

    def logs(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.total_steps or (self.log_first and step == 1)

    def evaluates(self, step: int) -> bool:
        if step == 0:
            return self.evaluate_first
        return self.evaluate_every is not None and (step % self.evaluate_every == 0 or step == self.total_steps)

    def saves(self, step: int) -> bool:
        return self.save_every is not None and (step % self.save_every == 0 or step == self.total_steps)


@dataclass
class Meter:
    """Adds up the reports of the steps since the last log line.

    Reports are read one step late, while the device works on the next step, unless the next batch has to wait anyway.
    """

    schedule: Schedule
    log: Log
    num_tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    tally: Tally = field(default_factory=Tally)
    times: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    since: float = field(default_factory=time.perf_counter)

    def spend(self, **times: float) -> None:
        """Note seconds of host time, by purpose, when they have been spent."""
        for name, seconds in times.items():
            self.times[name] = self.times.get(name, 0.0) + seconds

    def read(self, step: int, pending: Pending) -> None:
        """Take in what `step`, a number from 1, has come to; blocks until the device has finished it.

        Raises:
            NonFiniteError: MAX_NONFINITE steps in a row were not finite.
        """
        report = jax.device_get(pending.report)
        self.tally.add(pending.metrics)
        self.num_tokens += int(report.num_tokens)
        self.skipped += not report.finite
        self.skipped_in_a_row = 0 if report.finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_NONFINITE:
            raise NonFiniteError(
                f"loss or gradient was not finite in {MAX_NONFINITE} steps in a row, the last at step {step}; "
                "lower --learning_rate or look at the data"
            )
        if report.finite:
            self.tally.add(report.metrics)
        self.steps += 1
        self.tokens += int(report.num_tokens)
        rate = self.tokens / (time.perf_counter() - self.since)
        loss = loss_of(report.metrics)
        self.log.progress(step, float(loss.total) / max(float(loss.count), 1.0), rate)
        if self.schedule.logs(step):
            self._write(step, {name: float(value) for name, value in report.latest.items()}, rate)
            self.restart()

    def _write(self, step: int, latest: dict[str, float], rate: float) -> None:
        values = self.tally.values()
        loss = values.pop("loss", math.nan)  # no step of the window was finite
        row = {"epoch": step / self.schedule.steps_per_epoch, "loss": loss, **latest, **values}
        row["num_tokens"] = self.num_tokens
        row["tokens_per_second"] = rate
        row["step_time"] = (time.perf_counter() - self.since) / self.steps
        for name, seconds in self.times.items():
            row[f"{name}_time"] = seconds / self.steps
        row["input_share"] = self.times.get("input", 0.0) / (row["step_time"] * self.steps)  # spent waiting for batches
        if self.skipped:
            row["skipped_steps"] = self.skipped
        self.log.log(step, row)

    def restart(self) -> None:
        """Begin a new window."""
        self.tally.clear()
        self.times.clear()
        self.steps = self.tokens = 0
        self.since = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leave time spent on evaluation and saving out of the rates."""
        self.since += seconds


def fit(
    state: TrainState,
    *,
    source: Source,
    annotate: Callable[[TrainState, Batch], Batch],
    step: Callable[[TrainState, Batch], tuple[TrainState, StepReport]],
    evaluate: Callable[[TrainState], dict[str, float]] | None,
    save: Callable[[TrainState, int, dict[str, Any], dict[str, float], Sequence[Batch]], None],
    schedule: Schedule,
    log: Log,
    num_tokens: int = 0,
) -> TrainState:
    """Train from `state.step` to `schedule.total_steps`.

    Args:
        state: where to begin; it is dead afterwards.
        source: gives the batch of each step from there on.
        annotate: adds the columns that need no gradient.
        step: the compiled train step.
        evaluate: held-out metrics of a state.
        save: starts a checkpoint of (state, step, facts, metrics of its evaluation, what the source keeps).
        schedule: which steps log, evaluate and save.
        log: receives metrics.
        num_tokens: real tokens trained on before, for a resumed run.

    Returns:
        The final state.
    """
    meter = Meter(schedule, log, num_tokens=num_tokens)
    pending: Pending | None = None
    start = int(state.step)
    if evaluate is not None and start == 0 and schedule.evaluates(0):
        log.log(0, {"epoch": 0.0, **evaluate(state)})
        meter.restart()
    for done in range(start + 1, schedule.total_steps + 1):
        if pending is not None and not source.ahead:
            meter.read(done - 1, pending)
            pending = None
        began = time.perf_counter()
        fed = source(state)
        ready = time.perf_counter()
        state, report = step(state, annotate(state, fed.batch))
        waited = ready - began - sum(fed.times.values())
        meter.spend(**fed.times, input=waited, host=time.perf_counter() - ready)
        if pending is not None:
            meter.read(done - 1, pending)
        pending = Pending(report, fed.metrics)
        if not (schedule.evaluates(done) or schedule.saves(done) or done == schedule.total_steps):
            continue
        meter.read(done, pending)
        pending = None
        paused, metrics = time.perf_counter(), {}
        if evaluate is not None and schedule.evaluates(done):
            metrics = evaluate(state)
            log.log(done, {"epoch": done / schedule.steps_per_epoch, **metrics})
        if schedule.saves(done):
            save(state, done, {"num_tokens": meter.num_tokens}, metrics, source.kept())
        meter.pause(time.perf_counter() - paused)
    return state
