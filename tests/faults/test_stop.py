"""SIGTERM in every phase, and a run that is stuck."""

import signal
import time

import pytest

from tests.faults.rig import assert_equal, outcome

pytestmark = pytest.mark.faults

EVALUATED = "--eval_strategy steps --eval_steps 3 --dataset_test_split train --per_device_eval_batch_size 1"
# phase: method, faults, flags, what the run says, one after the other, until it is in it, and whether a step is saved
PHASES = {
    "load": ("sft", "paced,slow_loading", "", ["loading"], False),
    "compile": ("sft", "paced,slow_compilation", "", ["compiling"], False),
    "train": ("dpo", "paced:0.3", "", ["step 6"], True),
    "evaluate": ("dpo", "paced,slow_evaluation", EVALUATED, ["evaluating", "evaluating"], True),
    "generate": ("grpo", "paced,slow_generation", "", ["step 4", "generating"], True),
    "score": ("ppo", "paced", "--reward_funcs {home}/rewards.py:slow", ["step 4", "scoring"], True),
    "save": ("sft", "paced,slow_save:3", "", ["saving"], True),
}


@pytest.mark.parametrize("phase", PHASES)
def test_told_to_stop(rig, phase, tmp_path, counts):
    if phase not in counts(["compile", "evaluate", "score"], PHASES):
        pytest.skip("of the long tier")
    method, faults, flags, words, is_saved = PHASES[phase]
    run = rig.start(method, tmp_path / "out", flags.format(home=rig.home), faults)
    for word in words:
        assert run.until(word), run.output
    told = time.monotonic()
    run.signal(signal.SIGTERM)
    assert run.wait() == 75, run.output
    assert time.monotonic() - told < 10
    assert ("which is saved" in run.output) == is_saved, run.output
    assert any((tmp_path / "out" / "checkpoints").glob("*/manifest.json")) == is_saved


@pytest.mark.parametrize("phase", ["evaluate", "generate"])
def test_what_was_cut_is_made_up_for(rig, phase, whole, for_long, tmp_path):
    """A run that was told to stop and one that was not come to the same."""
    method, faults, flags, words, _ = PHASES[phase]
    run = rig.start(method, tmp_path / "out", flags, faults)
    for word in words:
        assert run.until(word), run.output
    run.signal(signal.SIGTERM)
    assert run.wait() == 75, run.output
    assert rig.run(method, tmp_path / "out", flags) == 0
    if phase == "evaluate":
        assert rig.run(method, tmp_path / "whole", flags) == 0
    assert_equal(outcome(tmp_path / "out"), outcome(tmp_path / "whole") if flags else whole(method))


def test_stuck(rig, tmp_path):
    run = rig.start("sft", tmp_path / "out", '--phase_timeouts {"train":3}', "paced,stuck:5")
    assert run.until("stuck")
    began = time.monotonic()
    assert run.wait() == 76
    assert time.monotonic() - began < 5
    assert "stuck in train for more than 3 seconds" in run.output and "driver.py" in run.output


def test_two_signals_end_at_once(rig, tmp_path):
    run = rig.start("sft", tmp_path / "out", "", "paced,slow_save:20")
    assert run.until("saving")
    for _ in range(2):
        run.signal(signal.SIGTERM)
        time.sleep(0.5)
    began = time.monotonic()
    assert run.wait() == 75
    assert time.monotonic() - began < 2
    assert "told to stop again" in run.output


def test_two_runs_do_not_share_a_folder(rig, whole, tmp_path):
    first = rig.start("sft", tmp_path / "out", faults="paced:0.5")
    assert first.until("step 6"), first.output
    began = time.monotonic()
    second = rig.start("sft", tmp_path / "out")
    assert second.wait() == 2, second.output
    assert "belongs to a run that is at work (process " in second.output
    assert time.monotonic() - began < 10
    first.signal(9)
    first.wait()
    assert rig.run("sft", tmp_path / "out") == 0
    assert_equal(outcome(tmp_path / "out"), whole("sft"))


def test_a_full_disk_ends_the_run_and_spoils_nothing(rig, whole, tmp_path):
    run = rig.start("sft", tmp_path / "out", faults="paced:0.3,no_room:6")
    assert run.wait() == 78, run.output
    assert "Traceback" not in run.output.split("jaxpost: ")[-1]
    assert [path.parent.name for path in (tmp_path / "out" / "checkpoints").glob("*/manifest.json")] == ["4"]
    assert rig.run("sft", tmp_path / "out") == 0
    assert_equal(outcome(tmp_path / "out"), whole("sft"))
