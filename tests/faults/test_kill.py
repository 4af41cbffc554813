"""kill -9, and the same command again."""

import random
import time

import pytest

from tests.faults.rig import FLAGS, STEPS, assert_equal, outcome

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("method", FLAGS)
def test_killed_at_random_moments(rig, whole, method, counts, tmp_path):
    """The result is that of the uninterrupted run, bit for bit, and each step has had the same batch."""
    if method not in counts(["sft", "grpo"], FLAGS):
        pytest.skip("of the long tier")
    expected = whole(method)
    for trial in range(counts(1, 20)):
        out, rng, kills = tmp_path / str(trial), random.Random(f"{method} {trial}"), 0
        while True:
            run = rig.start(method, out, faults="paced:0.1,slow_save:0.2")
            if kills < counts(1, 2) and run.until("step"):
                time.sleep(rng.uniform(0, 0.15 * STEPS))
                run.signal(9)
            kills += 1
            code = run.wait()
            if code == 0:
                break
            assert code == -9, run.output
        assert_equal(outcome(out), expected)


@pytest.mark.parametrize("method", FLAGS)
def test_killed_inside_a_save(rig, whole, method, counts, tmp_path):
    if method not in counts(["sft", "grpo"], FLAGS):
        pytest.skip("of the long tier")
    expected = whole(method)
    for trial in range(counts(1, 20)):
        out, rng = tmp_path / str(trial), random.Random(f"{method} {trial}")
        run = rig.start(method, out, faults="paced,slow_save:1")
        for _ in range(rng.randint(1, 3)):
            assert run.until("saving")
        time.sleep(rng.uniform(0, 0.9))
        run.signal(9)
        run.wait()
        assert any("orbax-checkpoint-tmp" in path.name for path in (out / "checkpoints").iterdir())
        again = rig.start(method, out)
        assert again.wait() == 0, again.output
        assert_equal(outcome(out), expected)
        assert {path.name for path in (out / "checkpoints").iterdir()} == {"4", "8", "12"}
