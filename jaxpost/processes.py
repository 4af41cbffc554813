"""The processes of a run: how they find each other, and how they agree.

All of them run the same program at the same time. What a function here says is the same on every process, and where
there are several it returns on none before all have called it: no process may leave out a call that others make.
"""

import itertools
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxpost import watch
from jaxpost.errors import ConfigError, JaxpostError, PreemptedError, one_line
from jaxpost.options import Group, option

Made = TypeVar("Made")
DEVICES = Path("/dev")  # where a machine's TPU chips are files


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """Which processes make up the run: by default those of the Slurm step or TPU pod that it is started on, or one."""

    help_group = Group.DEVICES

    coordinator_address: str | None = option(
        None, "host:port of process 0, where the processes of the run meet.", may_change=True
    )
    num_processes: int | None = option(None, "How many processes there are.", may_change=True)
    process_id: int | None = option(None, "Number of this one, from 0.", may_change=True)
    heartbeat_timeout: int = option(
        60, "Seconds without a sign of life after which a process counts as dead, and all end.", may_change=True
    )

    def __post_init__(self) -> None:
        given = (self.coordinator_address, self.num_processes, self.process_id)
        if any(value is None for value in given) and any(value is not None for value in given):
            raise ConfigError("coordinator_address, num_processes and process_id go together; give all three or none")
        if self.num_processes is not None and self.process_id is not None:
            if self.num_processes < 1:
                raise ConfigError(f"num_processes is {self.num_processes}; it must be at least 1")
            if not 0 <= self.process_id < self.num_processes:
                raise ConfigError(
                    f"process_id is {self.process_id}; of {self.num_processes} processes it is one from 0 to "
                    f"{self.num_processes - 1}"
                )
        if self.heartbeat_timeout < 1:
            raise ConfigError(f"heartbeat_timeout is {self.heartbeat_timeout}; it must be at least 1")


def join(config: ProcessesConfig) -> None:
    """Meet the other processes, if there are any; before anything else is done with JAX.

    Raises:
        ConfigError: they do not come.
    """
    given = (config.coordinator_address, config.num_processes, config.process_id)
    place = config.coordinator_address or _launcher()
    if place is None or jax.distributed.is_initialized():
        return
    seconds = config.heartbeat_timeout
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=seconds, initialization_timeout=300)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes do not meet at {place}: {one_line(error)}") from error
    if jax.default_backend() == "cpu":
        # The first process alone finds its programs there, and they send in another order than those that are compiled.
        jax.config.update("jax_enable_compilation_cache", False)


def _launcher() -> str | None:
    """What has started a process on each of several machines, and tells JAX who they are; None if nothing has."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return "the first node of the Slurm step"
    if "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu"):
        return None
    chips = [path for pattern in ("accel*", "vfio/[0-9]*") for path in DEVICES.glob(pattern)]
    return "the first host of the TPU slice" if chips and find_spec("libtpu") else None


def part() -> None:
    """Leave the other processes when all are about to: they meet at one, and without it those that are slower abort."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def own_share(count: int) -> slice:
    """Which of so many things in a row are this process's to work at; none, where there are fewer than processes."""
    number, processes = jax.process_index(), jax.process_count()
    return slice(count * number // processes, count * (number + 1) // processes)


def all_agree(fine: bool) -> bool:
    """Whether it is so on every process."""
    if jax.process_count() == 1:
        return fine
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def gathered(value: Any) -> list[Any]:
    """What each process gives, in their order; anything that can be pickled."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(1 << (int(sizes.max()) - 1).bit_length(), np.uint8)  # few sizes: each is a program
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agreed(make: Callable[[], Made]) -> Made:
    """What is made here, if every process can make it.

    Raises:
        JaxpostError: what the first one that cannot has raised.
    """
    made: list[Made] = []
    error = None
    try:
        made.append(make())
    except JaxpostError as fault:
        error = fault
    for first in filter(None, gathered(error)):
        raise first
    return made[0]


def fetch(tree: Any) -> Any:
    """Arrays as NumPy's, whole, on every process that has a part of them; where those are several, inside of a mesh."""
    if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return jax.device_get(_replicated(tree))


# Made once, so that nothing is compiled twice.
_replicated = jax.jit(lambda tree: tree, out_shardings=P())
_calls = itertools.count()  # of `told_to_stop`, which are the same on every process


def told_to_stop() -> bool:
    """Whether the run should end here."""
    if jax.process_count() == 1:
        return watch.is_told()
    from jax.experimental import multihost_utils

    # All end at the same call, the next after those that any of them has made when the signal is heard; a number that
    # is left out would never be come to.
    return multihost_utils.reached_preemption_sync_point(next(_calls))


def check(arrays: Any) -> None:
    """Called now and then by what takes long and can be done again.

    `arrays` are those it works with. Where they are this process's alone, the other processes need not call.

    Raises:
        PreemptedError: the run has been told to stop.
    """
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(arrays)):
        watch.check()
    elif told_to_stop():
        raise PreemptedError("told to stop")
