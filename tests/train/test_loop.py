"""The loop with a stub for a step: what is logged, when, and when it stops."""

import os
import signal
import time

import jax.numpy as jnp
import pytest

from jaxpost import watch
from jaxpost.errors import ConfigError, NonFiniteError, PreemptedError
from jaxpost.metrics import Mean
from jaxpost.offline import Read
from jaxpost.train.loop import Loop, LoopConfig
from jaxpost.train.meter import NOTHING_KNOWN, Schedule, Work
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


class Saves:
    """Checkpoints that only say when they are asked to save."""

    is_due = False

    def __init__(self, events):
        self.events = events

    def save(self, state, number, facts, metrics, kept):
        self.events.append(("save", number, facts["num_tokens"]))

    def check(self):
        pass

    def finish(self):
        self.events.append(("finish",))


def run(
    totals,
    counts=None,
    *,
    finite=None,
    start=0,
    facts=None,
    evaluate=None,
    source=None,
    annotate=None,
    work=NOTHING_KNOWN,
    **schedule,
):
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
            spike=jnp.zeros((), bool),
        )
        log.events.append(("step", k + 1))
        return TrainState(state.step + 1, None, None, None), report

    options = {"total_steps": len(totals), "steps_per_epoch": 4, "log_every": 1, **schedule}
    loop = Loop(
        source=source or Source(lambda state: {}),
        annotate=annotate or (lambda state, batch: batch),
        step=step,
        evaluate=evaluate,
        checkpoints=Saves(log.events),
        schedule=Schedule(**options),
        log=log,
        work=work,
    )
    before = {"num_tokens": 100, "tally": [{}] * 4, "skipped": 0, "skipped_in_a_row": 0}
    final = loop.fit(TrainState(jnp.int32(start), None, None, None), before | (facts or {}))
    assert int(final.step) == len(totals)
    return log


def test_the_share_of_the_time_that_steps_wait_for_a_batch(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def takes(seconds):
        def act(*args):
            clock[0] += seconds
            return {}

        return act

    log = run([1.0] * 12, log_every=4, source=Source(takes(1.25)), annotate=takes(3.0))
    assert [row["input_share"] for _, row in log.rows[1:]] == [1 / 4.25] * 2
    assert [(row["input_time"], row["generation_time"], row["made"]) for _, row in log.rows[1:2]] == [(1.0, 0.25, 1.0)]


def test_evaluation_and_saving_are_told_and_left_out_of_the_rates(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def takes(seconds):
        def act(*args):
            clock[0] += seconds
            return {}

        return act

    monkeypatch.setattr(Saves, "save", takes(8.0))
    options = {"log_every": 4, "evaluate": takes(5.0), "evaluate_every": 2, "save_every": 4}
    log = run([1.0] * 8, source=Source(takes(1.0)), **options)
    train = [row for _, row in log.rows if "loss" in row]
    # of the second window: the evaluation after step 4, which comes after the line of step 4, and that after step 6
    assert (train[1]["evaluation_time"], train[1]["save_time"]) == (10.0 / 4, 8.0 / 4)
    assert train[1]["step_time"] == 1.0 and "save_time" not in train[0]
    assert train[1]["tokens_per_second"] == 10.0


def test_speed_is_told_of_a_device_and_of_what_devices_could_do():
    work = Work(num_devices=4, token_flops=6.0, peak_flops=600.0)
    for known in (work, work._replace(peak_flops=None)):
        [(_, row)] = run([1.0], work=known).rows
        assert row["device_tokens_per_second"] == row["tokens_per_second"] / 4
        assert row.get("mfu") == (None if known.peak_flops is None else row["tokens_per_second"] * 6.0 / 600.0)


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
        *(("step", 1), ("progress", 1), ("step", 2), ("step", 3), ("progress", 2)),
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


def told(number):
    """A source, and the log that is left of a run that is told to stop while batch `number` is made."""

    def make(state):
        if int(state.step) == number:
            os.kill(os.getpid(), signal.SIGTERM)
            while not watch.is_told():
                time.sleep(0.01)
            watch.check()
        return {}

    return Source(make)


def test_a_run_that_is_told_to_stop_saves_the_step_it_is_at(monkeypatch):
    events = []
    monkeypatch.setattr(Saves, "save", lambda self, state, n, facts, *_: events.append((int(state.step), n, facts)))
    with watch.watching(watch.WatchConfig()), pytest.raises(PreemptedError, match="step 2, which is saved") as error:
        run([1.0, 2.0, 3.0, 4.0], source=told(2), log_every=4)
    assert error.value.exit_code == 75
    (step, number, facts), *_ = events
    assert step == number == 2 and facts["num_tokens"] == 120 and facts["tally"][0]["loss"] == (3.0, 2.0)
    rows = run([1.0, 2.0, 3.0, 4.0], start=2, facts=facts, log_every=4).rows
    assert [(step, row["loss"], row["num_tokens"]) for step, row in rows] == [(4, 2.5, 140)]


def test_an_evaluation_that_is_cut_is_made_up_for(monkeypatch):
    saved = []
    monkeypatch.setattr(Saves, "save", lambda self, state, n, facts, metrics, *_: saved.append((n, facts, metrics)))

    def cut(state):
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            watch.check()
            time.sleep(0.01)

    with watch.watching(watch.WatchConfig()), pytest.raises(PreemptedError):
        run([1.0] * 4, evaluate=cut, evaluate_every=2, save_every=2)
    (number, facts, _), *_ = saved
    assert number == 2 and facts["owes_evaluation"]
    log = run([1.0] * 4, start=2, facts=facts, evaluate=lambda state: {"eval_loss": 5.0}, evaluate_every=2)
    assert [step for step, row in log.rows if "eval_loss" in row] == [2, 4]
    assert saved[1][0] == 2 and saved[1][2] == {"eval_loss": 5.0} and not saved[1][1]["owes_evaluation"]
