"""What the steps of a run have come to: read from the device, added up, and told to the world."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import jax

from jaxpost.errors import NonFiniteError
from jaxpost.metrics import Metric, Tally, loss_of
from jaxpost.train.step import StepReport

MAX_NONFINITE = 5


@runtime_checkable
class Log(Protocol):
    """What the loop tells the world; see `train.logging.RunLog`."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def progress(self, step: int, loss: float | None, tokens_per_second: float | None) -> None: ...


@runtime_checkable
class Rhythm(Protocol):
    """Which steps do what; see `Schedule`, and `train.callbacks.Callbacks`, which may change it."""

    @property
    def steps_per_epoch(self) -> int: ...

    def logs(self, step: int, /) -> bool: ...

    def evaluates(self, step: int, /) -> bool: ...

    def saves(self, step: int, /) -> bool: ...

    def goes_on(self, step: int, /) -> bool: ...

    def passed(self, step: int, /) -> bool: ...


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

    @classmethod
    def of(cls, args: Any, total_steps: int, steps_per_epoch: int) -> Self:
        """What the config of a run says."""
        evaluates = {"no": None, "steps": args.eval_steps or args.logging_steps, "epoch": steps_per_epoch}
        return cls(
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            log_every=args.logging_steps,
            log_first=args.logging_first_step,
            evaluate_first=args.eval_on_start,
            evaluate_every=evaluates[args.eval_strategy],
            save_every={"no": None, "steps": args.save_steps, "epoch": steps_per_epoch}[args.save_strategy],
        )

    def logs(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.total_steps or (self.log_first and step == 1)

    def evaluates(self, step: int) -> bool:
        if step == 0:
            return self.evaluate_first
        return self.evaluate_every is not None and (step % self.evaluate_every == 0 or step == self.total_steps)

    def saves(self, step: int) -> bool:
        return self.save_every is not None and (step % self.save_every == 0 or step == self.total_steps)

    def goes_on(self, step: int) -> bool:
        """Whether there is a step after this one; if so it is about to begin."""
        return step < self.total_steps

    def passed(self, step: int) -> bool:
        """Told of a step that is done: whether what it has come to is to be known at once."""
        return step == self.total_steps


class Work(NamedTuple):
    """What there is to do for a token, and what with.

    Attributes:
        num_devices: all that the run is on.
        token_flops: of training on a token, forwards and backwards.
        peak_flops: a second, of all devices; None where it is not known.
    """

    num_devices: int = 1
    token_flops: float = 0.0
    peak_flops: float | None = None


NOTHING_KNOWN = Work()


@dataclass
class Meter:
    """Adds up the reports of the steps since the last log line.

    Reports are read one step late, while the device works on the next step, unless the next batch has to wait anyway.
    """

    schedule: Rhythm
    log: Log
    work: Work = NOTHING_KNOWN
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
        self.skipped += not report.finite or bool(report.spike)
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
        row["device_tokens_per_second"] = rate / self.work.num_devices
        if self.work.peak_flops is not None:
            row["mfu"] = rate * self.work.token_flops / self.work.peak_flops
        row["step_time"] = (time.perf_counter() - self.since) / self.steps
        for name, seconds in self.times.items():
            row[f"{name}_time"] = seconds / self.steps
        row["input_share"] = self.times.get("input", 0.0) / (row["step_time"] * self.steps)  # spent waiting for batches
        if self.skipped:
            row["skipped_steps"] = self.skipped
        self.log.log(step, row)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, in JSON's types; the times are not among it."""
        skipped = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return {"num_tokens": self.num_tokens, "tally": self.tally.kept(), **skipped}

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.num_tokens = facts["num_tokens"]
        self.tally.resume(facts["tally"])
        self.skipped, self.skipped_in_a_row = facts["skipped"], facts["skipped_in_a_row"]

    def restart(self) -> None:
        """Begin a new window."""
        self.tally.clear()
        self.times.clear()
        self.steps = self.tokens = 0
        self.since = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leave time spent on evaluation and saving out of the rates."""
        self.since += seconds
