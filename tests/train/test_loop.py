"""The loop with a stub for a step: what is logged, when, and when it stops."""

import jax.numpy as jnp
import pytest

from jaxpost.errors import ConfigError, NonFiniteError
from jaxpost.metrics import Mean
from jaxpost.offline import Read
from jaxpost.train.loop import LoopConfig, Schedule, fit
from jaxpost.train.state import TrainState
from jaxpost.train.step import StepReport


class Recorder:
    def __init__(self):
        self.rows, self.events = [], []

    def log(self, step, metrics):
        self.rows.append((step, metrics))

    def progress(self, step, loss, tokens_per_second):
        self.events.append(("progress", step))


class Source:
    """Batches that a function makes of the state."""

    def __init__(self, make, ahead=True):
        self.make, self.ahead = make, ahead

    def __call__(self, state):
        return Read(self.make(state), {"made": Mean(1.0, 1.0)}, {"generation": 0.25})

    def kept(self):
        return []


def run(totals, counts=None, *, finite=None, start=0, evaluate=None, source=None, annotate=None, **schedule):
    """Fit with step k giving Mean(totals[k], counts[k])."""
    counts, finite = counts or [1.0] * len(totals), finite or [True] * len(totals)
    log = Recorder()

    def step(state, batch):
        k = int(state.step)
        report = StepReport(
            metrics={"loss": Mean(jnp.float32(totals[k]), jnp.float32(counts[k]))},
            latest={"learning_rate": jnp.float32(k)},
            num_tokens=jnp.int32(10),
            finite=jnp.asarray(finite[k]),
        )
        log.events.append(("step", k + 1))
        return TrainState(state.step + 1, None, None, None), report

    options = {"total_steps": len(totals), "steps_per_epoch": 4, "log_every": 1, **schedule}
    final = fit(
        TrainState(jnp.int32(start), None, None, None),
        source=source or Source(lambda state: {}),
        annotate=annotate or (lambda state, batch: batch),
        step=step,
        evaluate=evaluate,
        save=lambda state, number, facts, metrics, kept: log.events.append(("save", number, facts["num_tokens"])),
        schedule=Schedule(**options),
        log=log,
        num_tokens=100,
    )
    assert int(final.step) == len(totals)
    return log


def test_the_share_of_the_time_that_steps_wait_for_a_batch(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("jaxpost.train.loop.time.perf_counter", lambda: clock[0])

    def takes(seconds):
        def act(*args):
            clock[0] += seconds
            return {}

        return act

    log = run([1.0] * 12, log_every=4, source=Source(takes(1.25)), annotate=takes(3.0))
    assert [row["input_share"] for _, row in log.rows[1:]] == [1 / 4.25] * 2
    assert [(row["input_time"], row["generation_time"], row["made"]) for _, row in log.rows[1:2]] == [(1.0, 0.25, 1.0)]


def test_a_source_that_needs_the_state_waits_for_the_step_before():
    events = []
    source = Source(lambda state: events.append(("made", int(state.step))) or {}, ahead=False)
    log = run([1.0, 2.0], source=source)
    assert [row["loss"] for _, row in log.rows] == [1.0, 2.0]
    assert events == [("made", 0), ("made", 1)]
    names = [event[:2] for event in log.events]
    assert names.index(("progress", 1)) < names.index(("step", 2))


def test_a_window_is_a_sum_over_a_sum():
    log = run([1.0, 9.0, 4.0, 4.0], [1.0, 3.0, 2.0, 2.0], log_every=2)
    assert [(step, row["loss"]) for step, row in log.rows] == [(2, 10 / 4), (4, 8 / 4)]
    assert log.rows[1][1]["learning_rate"] == 3
    assert log.rows[1][1]["num_tokens"] == 140
    assert log.rows[1][1]["epoch"] == 1.0


def test_a_report_is_read_while_the_next_step_runs():
    log = run([1.0] * 3)
    assert log.events == [
        *(("step", 1), ("step", 2), ("progress", 1), ("step", 3), ("progress", 2)),
        *(("progress", 3),),
    ]


def test_saves_and_evaluations_see_the_state_of_their_step():
    seen = []
    evaluate = lambda state: seen.append(int(state.step)) or {"eval_loss": 1.0}  # noqa: E731
    log = run([1.0] * 5, evaluate=evaluate, evaluate_every=2, evaluate_first=True, save_every=3)
    assert seen == [0, 2, 4, 5]
    assert [event for event in log.events if event[0] == "save"] == [("save", 3, 130), ("save", 5, 150)]
    assert [step for step, row in log.rows if "eval_loss" in row] == seen


def test_a_resumed_run_begins_where_it_was_and_ends_where_it_should():
    log = run([1.0] * 6, start=4)
    assert [step for step, _ in log.rows] == [5, 6]


def test_five_steps_in_a_row_that_are_not_finite_halt():
    nan = float("nan")
    run([nan] * 4 + [1.0] + [nan] * 4, finite=[False] * 4 + [True] + [False] * 4)
    with pytest.raises(NonFiniteError, match="5 steps in a row, the last at step 7") as error:
        run([1.0, 1.0] + [nan] * 6, finite=[True, True] + [False] * 6)
    assert error.value.exit_code == 77


def test_a_skipped_step_is_counted_and_spoils_no_mean():
    log = run([1.0, float("nan"), 3.0, 5.0], finite=[True, False, True, True], log_every=2)
    assert [row["loss"] for _, row in log.rows] == [1.0, 4.0]
    assert [row["skipped_steps"] for _, row in log.rows] == [1, 1]


def test_length_of_a_run():
    assert LoopConfig(num_train_epochs=1.5).total_steps(5) == 8
    assert LoopConfig(max_steps=3).total_steps(5) == 3
    for wrong in ({"max_steps": 0}, {"max_steps": -2}, {"num_train_epochs": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            LoopConfig(**wrong)
