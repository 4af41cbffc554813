"""Two processes of one run, of which one is told to stop, dies or is stuck."""

import json
import re
import signal
import time

import pytest

from tests.faults.rig import assert_equal, outcome

pytestmark = pytest.mark.faults

FLAGS = "--per_device_train_batch_size 1 --max_length 64"


def start(rig, out, more="", faults="paced"):
    return rig.start_two("sft", out, f"--packing false {FLAGS} {more}", faults)


def complete(out):
    return {int(path.parent.name) for path in (out / "checkpoints").glob("*/manifest.json")}


def test_one_is_told_to_stop_and_both_save_the_same_step(rig, tmp_path, is_long):
    out = tmp_path / "out"
    runs = start(rig, out, faults="paced:0.3")
    for run in runs:
        assert run.until("step 6"), run.output
    began = time.monotonic()
    runs[1].signal(signal.SIGTERM)
    assert [run.wait() for run in runs] == [75, 75], [run.output for run in runs]
    assert time.monotonic() - began < 10
    said = [re.search(r"told to stop at step (\d+), which is saved", run.output) for run in runs]
    (step,) = {int(found[1]) for found in said if found}
    assert all(said) and step in complete(out)
    if not is_long:
        return
    runs = start(rig, out)
    assert [run.wait() for run in runs] == [0, 0], [run.output for run in runs]
    others = start(rig, tmp_path / "whole")
    assert [run.wait() for run in others] == [0, 0], [run.output for run in others]
    assert_equal(outcome(out, f"{out}.0"), outcome(tmp_path / "whole", f"{tmp_path / 'whole'}.0"))


def test_one_dies_and_the_other_ends(rig, tmp_path):
    runs = start(rig, tmp_path / "out", "--heartbeat_timeout 10", "paced:0.3,dies:8:1")
    assert runs[1].until("dying"), runs[1].output
    began = time.monotonic()
    assert runs[1].wait() == -9
    assert runs[0].wait(60) != 0
    assert time.monotonic() - began < 15
    assert complete(tmp_path / "out") == {4}


def test_one_is_stuck_and_both_say_where(rig, tmp_path):
    timeouts = json.dumps({"train": 12}, separators=(",", ":"))
    runs = start(rig, tmp_path / "out", f"--phase_timeouts {timeouts}", "paced,stuck:6:1")
    assert runs[1].until("stuck"), runs[1].output
    began = time.monotonic()
    assert [run.wait(60) for run in runs] == [76, 76], [run.output for run in runs]
    assert time.monotonic() - began < 16
    assert all("stuck in train for more than 12 seconds" in run.output for run in runs)
