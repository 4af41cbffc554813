"""Callbacks in the loop with a stub for a step: what they are told, and what they change."""

import jax.numpy as jnp
import pytest

from jaxpost.errors import ConfigError
from jaxpost.metrics import Mean
from jaxpost.train.callbacks import TrainerCallback, TrainerControl, TrainerState, as_callbacks
from jaxpost.train.checkpoint_config import CheckpointConfig
from jaxpost.train.loop import Loop
from jaxpost.train.meter import Schedule
from jaxpost.train.state import TrainState
from jaxpost.train.steering import joined
from jaxpost.train.step import StepReport
from tests.train.test_loop import Recorder, Saves, Source


class Notes(TrainerCallback):
    """Writes down what it is told; `wishes` are flags of control to set after a step."""

    def __init__(self, **wishes):
        self.events, self.wishes = [], wishes

    def on_train_begin(self, args, state, control, **others):
        self.events.append(("begin", state.global_step))

    def on_epoch_begin(self, args, state, control, **others):
        self.events.append(("epoch", state.global_step))

    def on_epoch_end(self, args, state, control, **others):
        self.events.append(("end of epoch", state.global_step))

    def on_step_end(self, args, state, control, **others):
        self.events.append(("step", state.global_step))
        for name, step in self.wishes.items():
            if state.global_step == step:
                setattr(control, name, True)

    def on_log(self, args, state, control, logs, **others):
        self.events.append(("log", state.global_step, logs.get("loss", logs.get("eval_loss"))))

    def on_evaluate(self, args, state, control, metrics, **others):
        self.events.append(("evaluate", state.global_step, metrics["eval_loss"]))

    def on_save(self, args, state, control, **others):
        self.events.append(("save", state.global_step))


def run(*callbacks, steps=4, config=None, start=0, remembered=None, evaluates=True, told=None, **schedule):
    """Fit a loop whose step k has loss k and whose evaluation after it 10 k; its log, and what a checkpoint keeps."""
    log, kept = Recorder(), []

    def step(state, batch):
        loss = Mean(jnp.float32(int(state.step) + 1), jnp.float32(1))
        report = StepReport({"loss": loss}, {}, jnp.int32(1), jnp.asarray(True), jnp.zeros((), bool))
        log.events.append(("device", int(state.step) + 1))
        return TrainState(state.step + 1, None, None, None), report

    class Keeps(Saves):
        def save(self, state, number, facts, metrics, batches):
            kept.append((number, facts))

    options = {"total_steps": steps, "steps_per_epoch": 2, "log_every": 10, **schedule}
    state = TrainerState(global_step=start)
    loop = Loop(
        source=Source(lambda state: {}),
        annotate=lambda state, batch: batch,
        step=step,
        evaluate=(lambda state: {"eval_loss": 10.0 * int(state.step)}) if evaluates else None,
        checkpoints=Keeps(log.events),
        schedule=Schedule(**options),
        log=log,
    )
    told = [] if told is None else told
    config = config or CheckpointConfig()
    loop = joined(loop, as_callbacks(callbacks), config, state, remembered, told.append, {"processing_class": None})
    final = loop.fit(TrainState(jnp.int32(start), None, None, None))
    log.last, log.kept, log.state = int(final.step), kept, state
    return log


def test_a_callback_is_told_in_order_and_changes_nothing():
    notes = Notes()
    log = run(notes, log_every=2, evaluate_every=4, save_every=4)
    assert notes.events == [
        *(("begin", 0), ("epoch", 0), ("step", 1), ("step", 2), ("end of epoch", 2), ("log", 2, 1.5)),
        *(("epoch", 2), ("step", 3), ("step", 4), ("end of epoch", 4), ("log", 4, 3.5)),
        *(("log", 4, 40.0), ("evaluate", 4, 40.0), ("save", 4)),
    ]
    assert [row["loss"] for _, row in log.rows[:2]] == [1.5, 3.5]
    assert [row["step"] for row in log.state.log_history] == [2, 4, 4] and log.state.epoch == 2


def test_steps_whose_report_nobody_waits_for_are_read_late():
    events = run(Notes(), log_every=3, steps=3).events
    assert events.index(("device", 3)) < events.index(("progress", 2))


def test_a_callback_asks_for_a_row_an_evaluation_a_checkpoint_and_the_end():
    notes = Notes(should_log=1, should_evaluate=2, should_save=2)
    log = run(notes)
    assert [event for event in notes.events if event[0] in ("log", "evaluate", "save")] == [
        *(("log", 1, 1.0), ("log", 2, 20.0), ("evaluate", 2, 20.0), ("save", 2), ("log", 4, 3.0)),
    ]
    assert [number for number, _ in log.kept] == [2]
    log = run(Notes(should_training_stop=3), save_every=10)
    assert log.last == 3 and [number for number, _ in log.kept] == [3]
    assert log.kept[0][1]["callbacks"]["stopped"]
    assert run(Notes(should_training_stop=3)).kept == []  # save_strategy no


def test_what_a_row_or_an_evaluation_says_can_end_the_run_at_once():
    class Enough(TrainerCallback):
        def on_log(self, args, state, control, logs, **others):
            answer = TrainerControl(should_training_stop=logs.get("loss", 0) >= 2)
            return answer

    assert run(Enough(), log_every=1, steps=9).last == 2

    class NewCheckpoint(TrainerCallback):
        def on_evaluate(self, args, state, control, **others):
            control.should_save = True

    assert [number for number, _ in run(NewCheckpoint(), evaluate_every=2).kept] == [2, 4]


def test_a_run_that_a_callback_has_ended_stays_so_unless_it_is_to_go_on_with_changes():
    remembered, told = run(Notes(should_training_stop=2), save_every=10).kept[0][1]["callbacks"], []
    assert run(Notes(), start=2, remembered=remembered, told=told).last == 2
    assert told == ["a callback ended the run at step 2; --resume_with_changes true goes on"]
    config = CheckpointConfig(resume_with_changes=True)
    assert run(Notes(), start=2, remembered=remembered, config=config).last == 4
    at_the_end = run(Notes(), save_every=4).kept[0][1]["callbacks"]
    assert not at_the_end["stopped"]
    assert run(Notes(), start=4, steps=6, remembered=at_the_end).last == 6


class Patience(TrainerCallback):
    """Counts evaluations, in the manner of transformers' ExportableState."""

    count = 0

    def on_evaluate(self, args, state, control, **others):
        self.count += 1
        control.should_training_stop = self.count == 3

    def state(self):
        return {"args": {}, "attributes": {"count": self.count}}


def test_what_a_callback_remembers_survives_a_restart():
    first = run(Patience(), evaluate_every=1, save_every=1, steps=9)
    assert first.last == 3
    (number, facts), *_ = first.kept[1:]
    assert number == 2 and facts["callbacks"] == {"stopped": False, "attributes": [{"count": 2}]}
    again = run(Patience(), evaluate_every=1, steps=9, start=2, remembered=facts["callbacks"])
    assert again.last == 3


def test_the_best_evaluation_is_known_and_metrics_are_named_as_transformers_resolves_them():
    seen = []

    class Best(TrainerCallback):
        def on_evaluate(self, args, state, control, **others):
            seen.append((state.best_metric, args.metric_for_best_model, args.greater_is_better))

    config = CheckpointConfig(load_best_model_at_end=True)
    log = run(Best(), evaluate_every=2, config=config)
    assert seen == [(None, "loss", False), (20.0, "loss", False)]  # the best before this one
    assert (log.state.best_metric, log.state.best_global_step) == (20.0, 2)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="callbacks: dict is none; derive it from TrainerCallback"):
        as_callbacks([{}])
    (made,) = as_callbacks([Patience])
    assert isinstance(made, Patience)
    with pytest.raises(ConfigError, match="nothing to do it on: give eval_dataset"):
        run(Notes(should_evaluate=2), evaluates=False)
