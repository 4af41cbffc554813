"""TRL 1.10, the last that has BCO and PPO, installed beside the newer one for the tests that need it."""

import json
import os
import subprocess
import sys
from pathlib import Path

TRL = "trl==1.10.0"


def install(folder):
    """Put the older TRL alone in a folder; its dependencies are those that are installed."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(folder), TRL], check=True)
    return folder


def run(script, trl, *words):
    """The last line that a script prints, where TRL is the older one."""
    path = os.pathsep.join(map(str, [trl, Path(__file__).parents[2]]))
    environment = {**os.environ, "PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
