"""The memory of a device that a run's compiled programs take: the one way to estimate it."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from jaxpost.planning.abstract import bytes_per_device
from jaxpost.planning.programs import STEP, Planned, Program
from jaxpost.planning.topology import Refused, compiled


class Compiled(NamedTuple):
    """A program as its compiler sees it.

    Attributes:
        program: which one.
        arguments, temporaries: bytes of a device while it runs.
        text: the compiled module; empty where the compiler refuses, for which there are no figures but the memory's.
        compile_seconds: of this machine.
    """

    program: Program
    arguments: float
    temporaries: float
    text: str
    compile_seconds: float


def compile_program(program: Program, plan: Planned) -> Compiled:
    """Compile one of the programs of a run; its mesh is set (jax.set_mesh)."""
    began = time.perf_counter()
    executable = compiled(program.lower())
    if isinstance(executable, Refused):
        held = sum(_held(plan).values()) + program.held if executable.with_arguments else 0
        return Compiled(program, 0, max(0.0, executable.bytes - held), "", time.perf_counter() - began)
    text, memory = executable.as_text(), executable.memory_analysis()
    temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(program, memory.argument_size_in_bytes, temporaries, text, time.perf_counter() - began)


def memory_of(plan: Planned, programs: Sequence[Compiled]) -> dict[str, float]:
    """Bytes of a device by what they are for; the temporaries are those of the program that needs most."""
    most = max(programs, key=lambda each: each.temporaries + each.program.held)
    memory = _held(plan)
    gradients = memory["parameters"] if most.program.name == STEP else 0
    memory["gradients"] = min(gradients, most.temporaries)
    memory["activations and temporaries"] = most.temporaries - memory["gradients"]
    memory["completions, and weights at hand"] = most.program.held
    return {name: size for name, size in memory.items() if size}


def _held(plan: Planned) -> dict[str, float]:
    """Bytes of a device that are there all the time."""
    return {
        "parameters": bytes_per_device(plan.state.params),
        "frozen parameters": bytes_per_device(plan.state.frozen),
        "optimizer": bytes_per_device(plan.state.opt_state),
        "reference": bytes_per_device(plan.reference),
        "batch": bytes_per_device(plan.batch),
    }
