"""The processes of a run: how they find each other, and how they agree."""

from dataclasses import dataclass

import jax
import numpy as np

from jaxpost import watch
from jaxpost.errors import ConfigError, one_line
from jaxpost.options import option


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """Which processes make up the run; one by default."""

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
    if config.coordinator_address is None or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            initialization_timeout=300,
        )
    except RuntimeError as error:
        raise ConfigError(f"the processes do not meet at {config.coordinator_address}: {one_line(error)}") from error


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def all_agree(fine: bool) -> bool:
    """Whether it is so on every process."""
    if jax.process_count() == 1:
        return fine
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def told_to_stop(step: int) -> bool:
    """Whether the run should end at this step, which every process comes to: all get the same answer."""
    if jax.process_count() == 1:
        return watch.is_told()
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
