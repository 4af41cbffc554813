"""`jaxpost METHOD --dry_run`: what a run would be, on the devices that are here, before a weight is read.

The programs of the run are compiled for these devices, as `jaxpost plan` compiles them for others.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jaxpost.config_file import annotated
from jaxpost.errors import ConfigError
from jaxpost.methods import Method
from jaxpost.options import part_of
from jaxpost.planning.fit import smaller
from jaxpost.planning.memory import Compiled, compile_program, memory_of
from jaxpost.planning.programs import planned
from jaxpost.planning.report import memory_table
from jaxpost.preview import Preview, preview_of, show_data
from jaxpost.processes import is_main, join
from jaxpost.prompt_embeddings import embedder_of
from jaxpost.prompt_weights import PromptWeightsConfig
from jaxpost.rl.rewards import RewardFunctionsConfig, Rewards
from jaxpost.sharding import make_mesh

SUGGESTIONS = 3


def run_dry(method: Method, args: Any, console: Console | None = None) -> None:
    """Print the resolved config, devices, memory of a device, steps and examples or prompts; nothing is written.

    Args:
        method: an entry of METHODS.
        args: its config, as for training.
        console: where to print; standard output by default.

    Raises:
        ConfigError, DataError: what training would raise before its first step, but for the weights; or a device has
            less memory than is needed.
    """
    join(args)
    mesh = make_mesh(args.mesh)
    console = console or Console(highlight=False, soft_wrap=True, quiet=not is_main())
    preview = preview_of(method, args, mesh)
    if method.is_online:
        check_rewards(args)
    if isinstance(args, PromptWeightsConfig):
        embedder_of(args, None, mesh)
    console.print(annotated(preview.args, method.name), markup=False)
    console.rule("devices", align="left")
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    first = mesh.devices.flat[0]
    console.print(f"{mesh.size} x {first.device_kind}; mesh: {axes}")
    memory, programs = estimate(method, preview, mesh)
    capacity = capacity_of(first, len(mesh.local_devices))
    fits = sum(memory.values()) <= capacity and all(each.text for each in programs)
    console.rule("memory", align="left")
    console.print(memory_table(memory, capacity, fits=fits))
    spent = sum(each.compile_seconds for each in programs)
    names = ", ".join(each.program.name for each in programs)
    console.print(f"of the programs as compiled for these devices ({names}) in {spent:.0f} s", style="dim")
    console.rule("data", align="left")
    show_data(preview, console)
    if not fits:
        raise ConfigError(too_large(memory, capacity, preview.args))


def estimate(method: Method, preview: Preview, mesh: Mesh) -> tuple[dict[str, float], list[Compiled]]:
    """Bytes of a device by what they are for, and the compiled programs that need them."""
    base, prompt_length = preview.base, 1
    if isinstance(preview.data, tuple):
        prompt_length = max(map(len, preview.data[0].tokens))
    config = replace(base.config, vocab_size=max(base.vocab_size, base.config.vocab_size))
    with jax.set_mesh(mesh):
        plan = planned(
            method, preview.args, config, mesh, prompt_length, adapter=base.adapter, rows=_of_all(preview.longest)
        )
        programs = [compile_program(program, plan) for program in plan.programs]
    return memory_of(plan, programs), programs


def _of_all(rows: dict[str, np.ndarray] | None) -> dict[str, np.ndarray] | None:
    """As many rows as all processes have of a batch that each has its share of."""
    count = jax.process_count()
    return rows and {name: np.concatenate([column] * count) for name, column in rows.items()}


def capacity_of(device: Any, num_local: int) -> float:
    """Bytes that a device has: an accelerator's own, or its share of the memory of this machine."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / num_local


def check_rewards(args: Any) -> None:
    """Load the reward functions, but no reward model.

    Raises:
        ConfigError: there is none, or one cannot be loaded.
    """
    functions = [name for name in args.reward_funcs or [] if not Path(name).is_dir()]
    models = [*args.reward_models, *(name for name in args.reward_funcs or [] if Path(name).is_dir())]
    if functions or not models:
        Rewards(functions, part_of(args, RewardFunctionsConfig)).close()


def too_large(memory: dict[str, float], capacity: float, args: Any) -> str:
    """By how much, and what to try."""
    needed = sum(memory.values())
    flags = [flags for flags, _ in smaller(args)[:SUGGESTIONS]]
    return f"a device needs {needed / 1e9:.1f} GB of {capacity / 1e9:.1f}; try {', or '.join(flags)}"
