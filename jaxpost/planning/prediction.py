"""What a planned run would take: the memory of a chip, the seconds of a step, and what binds."""

import resource
from typing import NamedTuple

import numpy as np

from jaxpost.chips import Topology
from jaxpost.models.flops import train_flops
from jaxpost.planning.hlo import Cost, program_cost
from jaxpost.planning.memory import Compiled, compile_program, memory_of
from jaxpost.planning.programs import Planned


class Measured(NamedTuple):
    """A compiled program and what it costs.

    Attributes:
        compiled: which one.
        cost: of a run, on one device; nothing where the compiler refuses.
        seconds: of a run, for each of `compute`, `memory` and `network` alone.
    """

    compiled: Compiled
    cost: Cost
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        """Its share of an optimizer step: as long as the slowest of the three takes."""
        return self.compiled.program.times * max(self.seconds.values())


class Prediction(NamedTuple):
    """What a run would take.

    Attributes:
        programs: compiled.
        memory: bytes of a device by what they are for; the temporaries are those of the program that needs most.
        capacity: bytes of a device.
        model_flops: of an optimizer step on all devices, without what is computed again.
        peak: FLOPs a second of a device.
        num_tokens: that an optimizer step learns from.
        num_devices: all.
        host_bytes: most memory that this process has had.
    """

    programs: list[Measured]
    memory: dict[str, float]
    capacity: float
    model_flops: float
    peak: float
    num_tokens: int
    num_devices: int
    host_bytes: int

    @property
    def needed(self) -> float:
        """Bytes of a device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a device has as much, and the compiler, which leaves some to itself, thinks so too."""
        return self.needed <= self.capacity and all(each.compiled.text for each in self.programs)

    @property
    def step_seconds(self) -> float:
        """Of an optimizer step with all that belongs to it, if each program were as fast as its slowest resource."""
        return sum(program.step_seconds for program in self.programs)

    @property
    def mfu(self) -> float:
        """Share of the peak of all devices that the model's own FLOPs come to."""
        return self.model_flops / (self.step_seconds * self.peak * self.num_devices)

    @property
    def tokens_per_second(self) -> float:
        """Of a device."""
        return self.num_tokens / self.step_seconds / self.num_devices


def predict(plan: Planned, topology: Topology) -> Prediction:
    """Compile the programs of a run; its mesh is set (jax.set_mesh)."""
    measured = [_measured(compile_program(program, plan), plan, topology) for program in plan.programs]
    cores = plan.mesh.size / int(np.prod(topology.dims))  # devices of a chip
    return Prediction(
        programs=measured,
        memory=memory_of(plan, [each.compiled for each in measured]),
        capacity=topology.chip.memory / cores,
        model_flops=train_flops(plan.config, plan.num_tokens, plan.text_length, is_frozen=plan.args.use_peft),
        peak=topology.chip.flops / cores,
        num_tokens=plan.num_tokens,
        num_devices=plan.mesh.size,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _measured(compiled: Compiled, plan: Planned, topology: Topology) -> Measured:
    if not compiled.text:
        return Measured(compiled, Cost(0, 0, [], {}), {"compute": 0.0, "memory": 0.0, "network": 0.0})

    def trips(_: str, bound: float) -> float:
        open_trips = compiled.program.open_trips
        return bound if open_trips is None else open_trips

    cost, cores = program_cost(compiled.text, trips=trips), plan.mesh.size / int(np.prod(topology.dims))
    received = sum(each.times * each.bytes / topology.network(each.group) for each in cost.transfers)
    seconds = {
        "compute": cost.flops / topology.chip.flops * cores,
        "memory": cost.bytes / topology.chip.bandwidth * cores,
        "network": received * cores,
    }
    return Measured(compiled, cost, seconds)
