"""Callbacks by transformers' protocol: they see a run, and say when it logs, evaluates, saves and ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

from jaxpost.errors import ConfigError
from jaxpost.train.meter import Schedule


@dataclass
class TrainerState:
    """Where a run is; names of transformers' `TrainerState`.

    Attributes:
        epoch: passes over the data, a part of the last one included.
        global_step: optimizer steps that are done.
        max_steps: of the whole run.
        num_train_epochs: of the whole run.
        log_history: what was logged, oldest first, each with its `step`.
        best_metric: of the evaluations so far, where the run has a metric for it.
        best_global_step: the step that it is of.
        logging_steps, eval_steps, save_steps: steps between them; 0 for never.
        train_batch_size: rows per device.
        is_world_process_zero, is_local_process_zero: True: callbacks are called on one process.
    """

    epoch: float = 0.0
    global_step: int = 0
    max_steps: int = 0
    num_train_epochs: float = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    logging_steps: int = 0
    eval_steps: int = 0
    save_steps: int = 0
    train_batch_size: int = 0
    is_world_process_zero: bool = True
    is_local_process_zero: bool = True

    @classmethod
    def of(cls, args: Any, schedule: Schedule, rows: list[dict[str, float]], step: int | None = None) -> Self:
        """That of a run that has logged these rows, after a step; by default that of the last row."""
        step = int(rows[-1]["step"] if rows else 0) if step is None else step
        return cls(
            epoch=step / schedule.steps_per_epoch,
            global_step=step,
            max_steps=schedule.total_steps,
            num_train_epochs=schedule.total_steps / schedule.steps_per_epoch,
            log_history=rows,
            logging_steps=schedule.log_every,
            eval_steps=schedule.evaluate_every or 0,
            save_steps=schedule.save_every or 0,
            train_batch_size=args.per_device_train_batch_size,
        )


@dataclass
class TrainerControl:
    """What a run is to do after a step; names of transformers' `TrainerControl`. `should_epoch_stop` does nothing."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


class TrainerCallback:
    """Override what is of interest; each may change `control`. A keyword of all is `processing_class`.

    Called on the main process only. The arrays of the model belong to the step, so `model` is given at the end alone.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        """Before the first step."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        """Before the first step of a pass over the data."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        """Before a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        """After a step was begun on the device; what it has come to may not be known yet, unless it is to be logged."""

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        """After a row of metrics, which is `logs`."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        """After an evaluation, whose `metrics` begin with `eval_`."""

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        """After a checkpoint was begun."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        """After the last step of a pass over the data."""

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        """After the last step, with the trained `model`."""


@runtime_checkable
class Callback(Protocol):
    """What is called of a callback: those of `TrainerCallback`, which transformers' have too."""

    on_train_begin: Callable[..., Any]
    on_epoch_begin: Callable[..., Any]
    on_step_begin: Callable[..., Any]
    on_step_end: Callable[..., Any]
    on_log: Callable[..., Any]
    on_evaluate: Callable[..., Any]
    on_save: Callable[..., Any]
    on_epoch_end: Callable[..., Any]
    on_train_end: Callable[..., Any]


@runtime_checkable
class Exportable(Protocol):
    """A callback whose state a checkpoint keeps, as transformers' `ExportableState`."""

    def state(self) -> dict[str, Any]: ...


def as_callbacks(given: Sequence[Any] | None) -> list[Callback]:
    """Callbacks of objects, or of classes that need no arguments.

    Raises:
        ConfigError: one is none.
    """
    if not isinstance(given, Sequence | None):
        raise ConfigError(f"callbacks is {type(given).__name__}; give a list of them")
    made = [each() if isinstance(each, type) else each for each in given or ()]
    for each in made:
        if not isinstance(each, Callback):
            kind = type(each).__name__
            raise ConfigError(f"callbacks: {kind} is none; derive it from TrainerCallback, jaxpost's or transformers'")
    return made
