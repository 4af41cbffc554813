"""How the processes of a run find each other, without being told by flags."""

import os
import subprocess
import sys

import jax
import pytest

from jaxpost import processes
from jaxpost.errors import ConfigError
from jaxpost.processes import ProcessesConfig, join

MEETING = """
import jax
from jaxpost.processes import ProcessesConfig, gathered, join, part
join(ProcessesConfig())
print("SEEN", jax.process_index(), gathered(jax.process_index() + 10), jax.device_count(), flush=True)
part()
"""


@pytest.fixture
def asked(monkeypatch):
    """What JAX is asked to start, and nothing of this machine's own."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **limits: calls.append((args, limits)))
    for name in ("SLURM_STEP_NUM_TASKS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "find_spec", lambda name: object())
    return calls


def test_the_tasks_of_a_slurm_step_meet():
    shared = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    shared |= {"SLURM_STEP_NUM_TASKS": "2", "JAX_PLATFORMS": "cpu"}
    shared["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEETING],
            env={**os.environ, **shared, "SLURM_PROCID": str(number), "SLURM_LOCALID": "0"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert [line for text in said for line in text.splitlines() if line.startswith("SEEN")] == [
        "SEEN 0 [10, 11] 4",
        "SEEN 1 [10, 11] 4",
    ]


def test_one_task_or_a_shell_in_an_allocation_is_alone(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "DEVICES", tmp_path)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of the allocation
    join(ProcessesConfig())
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    join(ProcessesConfig())
    assert asked == []


@pytest.mark.parametrize("chip", ["accel0", "vfio/0"])
def test_a_host_with_tpu_chips_asks_its_slice(asked, monkeypatch, tmp_path, chip):
    (tmp_path / chip).parent.mkdir(exist_ok=True)
    (tmp_path / chip).touch()
    monkeypatch.setattr(processes, "DEVICES", tmp_path)
    join(ProcessesConfig(heartbeat_timeout=30))
    assert asked == [((None, None, None), {"heartbeat_timeout_seconds": 30, "initialization_timeout": 300})]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    join(ProcessesConfig())
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(processes, "find_spec", lambda name: None)  # no libtpu
    join(ProcessesConfig())
    assert len(asked) == 1


def test_flags_come_first_and_a_failure_names_the_place(asked, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    join(ProcessesConfig(coordinator_address="here:1", num_processes=3, process_id=2))
    assert asked[0][0] == ("here:1", 3, 2)

    def fails(*_, **__):
        raise ValueError("nobody is there")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    with pytest.raises(ConfigError, match="do not meet at the first node of the Slurm step: nobody is there"):
        join(ProcessesConfig())
