"""A long run with many faults."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.rig import assert_equal, outcome

pytestmark = pytest.mark.faults

STEPS, FAULTS = 2000, 10


def usage(pid):
    """Bytes of memory, and open files, of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_two_thousand_steps_with_ten_faults(rig, for_long, tmp_path):
    """Nothing is lost, and the second thousand, in one process, takes no more memory or files as it goes on."""
    flags = (
        f"--max_steps {STEPS} --save_steps 50 --save_total_limit 3 --lr_scheduler_type constant --learning_rate 1e-4"
    )
    rng = random.Random(0)
    assert rig.run("sft", tmp_path / "whole", flags, faults="paced:0") == 0
    out = tmp_path / "out"
    for fault in range(FAULTS):
        run = rig.start("sft", out, flags, faults="paced:0")
        assert run.until(f"step {(fault + 1) * 95} ", f"step {(fault + 1) * 95}", seconds=300), run.output[-2000:]
        time.sleep(rng.uniform(0, 0.5))
        run.signal(signal.SIGKILL if fault % 2 else signal.SIGTERM)
        assert run.wait() == (-9 if fault % 2 else 75)
    run = rig.start("sft", out, flags, faults="paced:0")
    measured = []
    for step in range(1100, STEPS, 100):
        assert run.until(f"step {step}", seconds=300), run.output[-2000:]
        measured.append(usage(run.process.pid))
    assert run.wait() == 0
    assert_equal(outcome(out), outcome(tmp_path / "whole"))
    (first, files), (last, files_then) = measured[1], measured[-1]
    print(f"memory {first / 1e6:.0f} -> {last / 1e6:.0f} MB, open files {files} -> {files_then}")
    assert last < 1.05 * first
    assert abs(files_then - files) <= 3  # of a save that is under way
