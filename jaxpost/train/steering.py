"""Callbacks of a run at work: to the loop they are its schedule and its log.

A run without callbacks has the plain ones, and nothing of this.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from typing import Any, Protocol

from jaxpost.errors import ConfigError
from jaxpost.objectives.base import Batch
from jaxpost.processes import gathered, is_main
from jaxpost.train.callbacks import Callback, Exportable, TrainerControl, TrainerState
from jaxpost.train.loop import Loop, Saves
from jaxpost.train.meter import Log, Schedule
from jaxpost.train.state import TrainState


class Tracks(Protocol):
    """What is read of a run's config."""

    @property
    def metric_for_best_model(self) -> str | None: ...

    @property
    def best_metric(self) -> str: ...

    def goodness(self, metrics: Mapping[str, float], /) -> float: ...


class Callbacks:
    """Callbacks of a run, in the place of its schedule and its log.

    Args:
        callbacks: from `as_callbacks`.
        args: of the run.
        schedule: what is done where they say nothing else.
        log: what receives metrics.
        state: as the run begins; it is kept up to date.
        can_evaluate: whether there is something to evaluate on.
        given: keywords of every call.
    """

    def __init__(
        self,
        callbacks: Sequence[Callback],
        args: Tracks,
        schedule: Schedule,
        log: Log,
        state: TrainerState,
        *,
        can_evaluate: bool,
        given: Mapping[str, Any],
    ):
        self.callbacks, self.args, self.schedule, self.state = callbacks, args, schedule, state
        self.control: Any = TrainerControl()
        self._log, self._can_evaluate, self._given = log, can_evaluate, given
        self._in_epoch = False
        for row in state.log_history:
            self._compare(row)

    @property
    def steps_per_epoch(self) -> int:
        """As of the schedule."""
        return self.schedule.steps_per_epoch

    def logs(self, step: int) -> bool:
        """Whether they, or the schedule, want a row after this step; asked before the next one begins."""
        return self.control.should_log

    def evaluates(self, step: int) -> bool:
        """Likewise an evaluation."""
        return self.control.should_evaluate if step else self.schedule.evaluates(0)

    def saves(self, step: int) -> bool:
        """Likewise a checkpoint; the last step of a run that saves is saved."""
        ends = self.control.should_training_stop and self.schedule.save_every is not None
        return self.control.should_save or ends

    def goes_on(self, step: int) -> bool:
        """Whether there is a step after this one; if so it begins."""
        if self.control.should_training_stop or not self.schedule.goes_on(step):
            self._end_epoch()
            return False
        if not self._in_epoch:
            self._in_epoch = True
            self.tell("on_epoch_begin")
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self.tell("on_step_begin")
        return True

    def passed(self, step: int) -> bool:
        """A step is done: they change what the schedule says, and whether it is the last."""
        control, schedule = self.control, self.schedule
        self.state.global_step, self.state.epoch = step, step / self.steps_per_epoch
        control.should_log = control.should_log or schedule.logs(step)
        control.should_evaluate = control.should_evaluate or (self._can_evaluate and schedule.evaluates(step))
        control.should_save = control.should_save or schedule.saves(step)
        control.should_training_stop = control.should_training_stop or not schedule.goes_on(step)
        self.tell("on_step_end")
        if step % self.steps_per_epoch == 0 or self.control.should_training_stop:
            self._end_epoch()
        if self.control.should_evaluate and not self._can_evaluate:
            raise ConfigError("a callback asks for an evaluation, and there is nothing to do it on: give eval_dataset")
        return self.control.should_log or self.control.should_training_stop

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """As of the log."""
        self._log.log(step, metrics)
        self.state.log_history.append({**metrics, "step": step})
        self.control.should_log = False
        self.tell("on_log", logs=dict(metrics))
        if any(name.startswith("eval_") for name in metrics):
            self.control.should_evaluate = False
            self.tell("on_evaluate", metrics=dict(metrics))
            self._compare({**metrics, "step": step})

    def progress(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        """As of the log."""
        self._log.progress(step, loss, tokens_per_second)

    def tell(self, event: str, **what: Any) -> None:
        """Call all of them, and let every process know what they want."""
        if is_main():
            for callback in self.callbacks:
                call = methodcaller(event, self.args, self.state, self.control, **self._given, **what)
                answer = call(callback)
                self.control = self.control if answer is None else answer
        self.control = gathered(self.control)[0]

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of them, in JSON's types."""
        kept = [_kept(callback) for callback in self.callbacks]
        stopped = self.control.should_training_stop and self.schedule.goes_on(self.state.global_step)
        return {"stopped": stopped, "attributes": json.loads(json.dumps(kept, default=float))}

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Go on from there; what is kept of a callback belongs to the one in the same place."""
        self.control.should_training_stop = facts["stopped"]
        for callback, attributes in zip(self.callbacks, facts["attributes"], strict=False):
            for name, value in attributes.items():
                setattr(callback, name, value)

    def _end_epoch(self) -> None:
        if self._in_epoch:
            self._in_epoch = False
            self.tell("on_epoch_end")

    def _compare(self, row: Mapping[str, float]) -> None:
        """Take note of an evaluation that is the best so far."""
        name = self.args.best_metric
        if self.args.metric_for_best_model is None or name not in row:
            return
        best = self.state.best_metric
        if best is None or self.args.goodness(row) > self.args.goodness({name: best}):
            self.state.best_metric, self.state.best_global_step = float(row[name]), int(row["step"])


def _kept(callback: Any) -> Mapping[str, Any]:
    """The attributes that a callback wants to have again."""
    if isinstance(callback, Exportable) and callable(callback.state):
        return callback.state().get("attributes", {})
    return {}


class Told:
    """Checkpoints that callbacks are told of, and that keep what those remember; see `train.loop.Saves`."""

    def __init__(self, checkpoints: Saves, callbacks: Callbacks):
        self._checkpoints, self._callbacks = checkpoints, callbacks

    @property
    def is_due(self) -> bool:
        return self._checkpoints.is_due

    def save(
        self,
        state: TrainState,
        step: int,
        facts: dict[str, Any],
        metrics: dict[str, float],
        kept: Sequence[Batch] = (),
    ) -> None:
        callbacks = self._callbacks
        self._checkpoints.save(state, step, {**facts, "callbacks": callbacks.facts()}, metrics, kept)
        callbacks.control.should_save = False
        callbacks.tell("on_save")

    def check(self) -> None:
        self._checkpoints.check()

    def finish(self) -> None:
        self._checkpoints.finish()


def joined(
    loop: Loop,
    callbacks: Sequence[Callback],
    args: Any,
    state: TrainerState,
    remembered: Mapping[str, Any] | None,
    message: Callable[[str], None],
    given: Mapping[str, Any],
) -> Loop:
    """A loop with callbacks in it, which are told that it begins.

    Args:
        loop: with a plain schedule.
        callbacks: from `as_callbacks`.
        args: the run's config.
        state: as the run begins.
        remembered: `facts` of the callbacks that a checkpoint has, of a run that goes on.
        message: says something to the user.
        given: keywords of every call.
    """
    schedule = loop.schedule
    assert isinstance(schedule, Schedule)
    if args.load_best_model_at_end:  # as transformers resolves them
        metric, more = args.best_metric.removeprefix("eval_"), args.goodness({args.best_metric: 1.0}) > 0
        args = dataclasses.replace(args, metric_for_best_model=metric, greater_is_better=more)
    joint = Callbacks(callbacks, args, schedule, loop.log, state, can_evaluate=loop.evaluate is not None, given=given)
    joint.tell("on_train_begin")
    if remembered is not None:
        joint.resume(remembered)
        if joint.control.should_training_stop and args.resume_with_changes:
            joint.control.should_training_stop = False
        elif joint.control.should_training_stop:
            message(f"a callback ended the run at step {state.global_step}; --resume_with_changes true goes on")
    return dataclasses.replace(loop, schedule=joint, log=joint, checkpoints=Told(loop.checkpoints, joint))
