"""The loop: the one place where steps follow each other. It knows no objective, model or dataset by name."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxpost import watch
from jaxpost.errors import ConfigError, PreemptedError
from jaxpost.metrics import Metric
from jaxpost.objectives.base import Batch
from jaxpost.options import Group, option
from jaxpost.processes import told_to_stop
from jaxpost.train.meter import NOTHING_KNOWN, Log, Meter, Pending, Rhythm, Work
from jaxpost.train.state import TrainState
from jaxpost.train.step import StepReport

LENGTHS = ("num_train_epochs", "max_steps")  # the fields that say when to stop


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train."""

    help_group = Group.OPTIMISATION

    num_train_epochs: float = option(3.0, "Passes over the data; max_steps overrides it.")
    max_steps: int = option(-1, "Optimizer steps; -1 to go by num_train_epochs.")
    seed: int = option(42, "Seed of everything random in the run.")

    def __post_init__(self) -> None:
        if self.max_steps < 1 and self.max_steps != -1:
            raise ConfigError(f"max_steps is {self.max_steps}; it must be at least 1, or -1 to go by num_train_epochs")
        if self.num_train_epochs <= 0:
            raise ConfigError(f"num_train_epochs is {self.num_train_epochs}; it must be above 0")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)


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


@runtime_checkable
class Saves(Protocol):
    """Where states are kept; see `train.checkpoint.Checkpoints`."""

    @property
    def is_due(self) -> bool: ...

    def save(
        self,
        state: TrainState,
        step: int,
        facts: dict[str, Any],
        metrics: dict[str, float],
        kept: Sequence[Batch] = ...,
        /,
    ) -> None: ...

    def check(self) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Steps that follow each other.

    Attributes:
        source: gives the batch of each step.
        annotate: adds the columns that need no gradient.
        step: the compiled train step.
        evaluate: held-out metrics of a state.
        checkpoints: where states are kept.
        schedule: which steps log, evaluate and save, and which is the last.
        log: receives metrics.
        work: what there is to do, which speed is compared with.
    """

    source: Source
    annotate: Callable[[TrainState, Batch], Batch]
    step: Callable[[TrainState, Batch], tuple[TrainState, StepReport]]
    evaluate: Callable[[TrainState], dict[str, float]] | None
    checkpoints: Saves
    schedule: Rhythm
    log: Log
    work: Work = NOTHING_KNOWN

    def fit(self, state: TrainState, facts: Mapping[str, Any] | None = None) -> TrainState:
        """Train from `state.step` for as long as the schedule says.

        Args:
            state: where to begin; it is dead afterwards.
            facts: what was saved with it, for a run that goes on.

        Returns:
            The final state.

        Raises:
            PreemptedError: the process was told to stop; the state is saved.
            NonFiniteError, CheckpointError: it cannot go on.
        """
        with watch.phase("train"):
            return _Fit(self, state, dict(facts or {})).run()


class _Fit:
    """A loop on its way."""

    def __init__(self, loop: Loop, state: TrainState, facts: dict[str, Any]):
        self.loop, self.state = loop, state
        self.start = self.done = int(state.step)
        self.owes_evaluation: bool = facts.pop("owes_evaluation", False)  # of the state as it is
        self.pending: Pending | None = None
        self.meter = Meter(loop.schedule, loop.log, loop.work)
        if facts:
            self.meter.resume(facts)

    def run(self) -> TrainState:
        try:
            if self.owes_evaluation or (self.start == 0 and self.loop.schedule.evaluates(0)):
                self._look_back()
            while self.loop.schedule.goes_on(self.done):
                self.loop.checkpoints.check()
                if told_to_stop():
                    raise PreemptedError("told to stop")
                is_first = self.done == self.start
                with watch.phase("compile" if is_first else "train"):
                    self._advance()
                    is_wanted = self.loop.schedule.passed(self.done)
                    if is_first or is_wanted:
                        self._read()
                self._look_back()
        except PreemptedError:
            self._leave()
        return self.state

    def _advance(self) -> None:
        """Take a step. What is interrupted before it leaves the state as it was."""
        loop, meter = self.loop, self.meter
        if not loop.source.ahead:
            self._read()
        began = time.perf_counter()
        fed = loop.source(self.state)
        ready = time.perf_counter()
        self.state, report = loop.step(self.state, loop.annotate(self.state, fed.batch))
        waited = ready - began - sum(fed.times.values())
        meter.spend(**fed.times, input=waited, host=time.perf_counter() - ready)
        self._read()
        self.done += 1
        self.pending = Pending(report, fed.metrics)

    def _read(self) -> None:
        """Take in what the last step has come to."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self.meter.read(self.done, pending)

    def _look_back(self) -> None:
        """Evaluate and save the state, where it is time; what an evaluation says can make it time to save."""
        loop, done, owed = self.loop, self.done, self.owes_evaluation
        evaluates = loop.evaluate is not None and (owed or loop.schedule.evaluates(done))
        if not (evaluates or self._saves(owed)):
            return
        self._read()
        began, metrics = time.perf_counter(), {}
        if loop.evaluate is not None and evaluates:
            self.owes_evaluation = True
            with watch.phase("evaluate"):
                metrics = loop.evaluate(self.state)
            loop.log.log(done, {"epoch": done / loop.schedule.steps_per_epoch, **metrics})
            self.owes_evaluation = False
        evaluated = time.perf_counter()
        saves = self._saves(owed)
        if saves:
            self._save(metrics)
        ended = time.perf_counter()
        if evaluates:
            self.meter.spend(evaluation=evaluated - began)
        if saves:
            self.meter.spend(save=ended - evaluated)
        self.meter.pause(ended - began)

    def _saves(self, owed: bool) -> bool:
        return self.done > 0 and (owed or self.loop.schedule.saves(self.done) or self.loop.checkpoints.is_due)

    def _save(self, metrics: dict[str, float]) -> None:
        facts = {**self.meter.facts(), "owes_evaluation": self.owes_evaluation}
        with watch.phase("save"):
            self.loop.checkpoints.save(self.state, self.done, facts, metrics, self.loop.source.kept())

    def _leave(self) -> None:
        """Save what there is and say so."""
        self._read()
        if self.done == self.start:
            raise PreemptedError(f"told to stop at step {self.done}, with nothing new to save")
        self._save({})
        with watch.phase("save"):
            self.loop.checkpoints.finish()
        raise PreemptedError(f"told to stop at step {self.done}, which is saved; the same command goes on from there")
