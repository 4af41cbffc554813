"""The search for the fastest plan that fits: rows of a device, mesh and what is recomputed."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxpost.errors import ConfigError
from jaxpost.models.config import ModelConfig
from jaxpost.models.remat import POLICIES

MOST_ROWS = 16


def candidates(args: Any, config: ModelConfig, num_devices: int) -> Iterator[list[Any]]:
    """Configs to try: lists of which the first that fits is the fastest of its list.

    The batch of an optimizer step stays what the flags say: rows of a device are taken from the accumulated ones, and
    the other way round, and where devices share rows each group of them has more. A mesh that was given stays.
    """
    sizes = _tensor(config, num_devices)
    meshes = {args.mesh: 1} if args.mesh else {f"fsdp={num_devices // size},tensor={size}": size for size in sizes}
    for mesh, sharing in meshes.items():
        for rows, accumulation in _splits(args, sharing):
            common = {"mesh": mesh, "per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
            policies = (args.remat_policy,) if args.remat_policy else tuple(POLICIES)
            yield [dataclasses.replace(args, **common, remat_policy=policy) for policy in policies]


def _tensor(config: ModelConfig, num_devices: int) -> list[int]:
    """Sizes of the tensor axis that divide heads and devices: 1, 2, 4, 8."""
    return [size for size in (1, 2, 4, 8) if num_devices % size == 0 and config.num_kv_heads % size == 0]


def _splits(args: Any, sharing: int) -> list[tuple[int, int]]:
    """(rows of a group of devices, accumulation) with the same product, the most rows first."""
    total = args.per_device_train_batch_size * args.gradient_accumulation_steps * sharing
    return [(rows, total // rows) for rows in range(min(total, MOST_ROWS), 0, -1) if total % rows == 0]


def smaller(args: Any) -> list[tuple[str, Any]]:
    """The smallest changes that may make a run fit, in the order in which they are tried."""
    changes: list[tuple[str, dict[str, Any]]] = []
    rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if args.remat_policy not in ("full", "offload") or not args.gradient_checkpointing:
        changes.append(("--remat_policy full", {"remat_policy": "full", "gradient_checkpointing": True}))
    while rows > 1 and rows % 2 == 0:
        rows, accumulation = rows // 2, accumulation * 2
        flags = f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulation}"
        changes.append((flags, {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}))
    if not args.offload_optimizer:
        changes.append(("--offload_optimizer", {"offload_optimizer": True}))
    if args.optim != "adamw_8bit":
        changes.append(("--optim adamw_8bit", {"optim": "adamw_8bit"}))
    if not args.use_peft:
        changes.append(("--use_peft", {"use_peft": True}))
    if not args.load_in_4bit:
        changes.append(("--use_peft --load_in_4bit", {"use_peft": True, "load_in_4bit": True}))
    made, last = [], args
    for flags, change in changes:
        try:
            last = dataclasses.replace(last, **change)
        except ConfigError:
            continue
        made.append((flags, last))
    return made
