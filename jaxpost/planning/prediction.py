"""What a planned run would take: the memory of a chip, the seconds of a step, and what binds."""

import resource
import time
from typing import NamedTuple

import numpy as np

from jaxpost.chips import Topology
from jaxpost.models.flops import train_flops
from jaxpost.planning.abstract import bytes_per_device
from jaxpost.planning.hlo import Cost, program_cost
from jaxpost.planning.programs import STEP, Planned, Program
from jaxpost.planning.topology import Refused, compiled


class Measured(NamedTuple):
    """A compiled program.

    Attributes:
        program: which one.
        cost: of a run, on one device.
        seconds: of a run, for each of `compute`, `memory` and `network` alone.
        arguments, temporaries: bytes of a device while it runs.
        text: the compiled module; empty where the compiler refuses, for which there are no figures but the memory's.
        compile_seconds: of this machine.
    """

    program: Program
    cost: Cost
    seconds: dict[str, float]
    arguments: float
    temporaries: float
    text: str
    compile_seconds: float

    @property
    def step_seconds(self) -> float:
        """Its share of an optimizer step: as long as the slowest of the three takes."""
        return self.program.times * max(self.seconds.values())


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
        return self.needed <= self.capacity and all(each.text for each in self.programs)

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
    measured = [_measured(program, plan, topology) for program in plan.programs]
    most = max(measured, key=lambda each: each.temporaries + each.program.held)
    memory = _held(plan)
    gradients = memory["parameters"] if most.program.name == STEP else 0
    memory["gradients"] = min(gradients, most.temporaries)
    memory["activations and temporaries"] = most.temporaries - memory["gradients"]
    memory["completions, and weights at hand"] = most.program.held
    cores = plan.mesh.size / int(np.prod(topology.dims))  # devices of a chip
    return Prediction(
        programs=measured,
        memory={name: size for name, size in memory.items() if size},
        capacity=topology.chip.memory / cores,
        model_flops=train_flops(plan.config, plan.num_tokens, plan.text_length, is_frozen=plan.args.use_peft),
        peak=topology.chip.flops / cores,
        num_tokens=plan.num_tokens,
        num_devices=plan.mesh.size,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _held(plan: Planned) -> dict[str, float]:
    """Bytes of a device that are there all the time."""
    return {
        "parameters": bytes_per_device(plan.state.params),
        "frozen parameters": bytes_per_device(plan.state.frozen),
        "optimizer": bytes_per_device(plan.state.opt_state),
        "reference": bytes_per_device(plan.reference),
        "batch": bytes_per_device(plan.batch),
    }


def _measured(program: Program, plan: Planned, topology: Topology) -> Measured:
    began, num_devices = time.perf_counter(), plan.mesh.size
    executable = compiled(program.lower())
    if isinstance(executable, Refused):
        held = sum(_held(plan).values()) + program.held if executable.with_arguments else 0
        nothing, spent = {"compute": 0.0, "memory": 0.0, "network": 0.0}, time.perf_counter() - began
        return Measured(program, Cost(0, 0, [], {}), nothing, 0, max(0.0, executable.bytes - held), "", spent)
    text, memory = executable.as_text(), executable.memory_analysis()
    spent = time.perf_counter() - began

    def trips(_: str, bound: float) -> float:
        return bound if program.open_trips is None else program.open_trips

    cost, cores = program_cost(text, trips=trips), num_devices / int(np.prod(topology.dims))
    received = sum(each.times * each.bytes / topology.network(each.group) for each in cost.transfers)
    seconds = {
        "compute": cost.flops / topology.chip.flops * cores,
        "memory": cost.bytes / topology.chip.bandwidth * cores,
        "network": received * cores,
    }
    temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Measured(program, cost, seconds, memory.argument_size_in_bytes, temporaries, text, spent)
