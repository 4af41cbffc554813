import os
import signal
import subprocess
import sys
import time

import pytest

from jaxpost import watch
from jaxpost.errors import ConfigError, PreemptedError


def test_a_signal_is_heard_and_the_handler_of_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with watch.watching(watch.WatchConfig()), watch.phase("train"):
        watch.check()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not watch.is_told() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(PreemptedError):
            watch.check()
    assert signal.getsignal(signal.SIGTERM) is before
    watch.check()  # nobody listens any more
    with watch.watching(watch.WatchConfig(), listens=False):
        assert signal.getsignal(signal.SIGTERM) is before


def ends(body):
    """Exit code and errors of a process that watches this."""
    code = (
        "import os, signal, time\nfrom jaxpost import watch\n"
        f"with watch.watching(watch.WatchConfig(phase_timeouts={{'train': 1}})):\n  {body}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_a_phase_that_takes_too_long_ends_the_process_and_says_where():
    code, said = ends("exec('with watch.phase(\"train\"): time.sleep(30)')")
    assert code == 76 and "stuck in train for more than 1 seconds" in said and "most recent call first" in said
    assert ends("[exec('with watch.phase(\"train\"): time.sleep(0.3)') for _ in range(5)]")[0] == 0


def test_a_signal_where_nothing_can_be_lost_ends_the_process():
    kill = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)"
    for body in (kill, f"exec('with watch.phase(\"compile\"): {kill}')"):
        code, said = ends(body)
        assert code == 75 and "nothing new to save" in said


@pytest.mark.parametrize("wrong", [{"trane": 3}, {"train": 0}, {"train": "long"}, {"train": True}])
def test_wrong_timeouts_are_named(wrong):
    with pytest.raises(ConfigError, match="phase_timeouts"):
        watch.WatchConfig(phase_timeouts=wrong)
