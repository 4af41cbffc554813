"""An adapter's arrays as the tensors of PEFT's files, and back.

PEFT stores A as [r, in] and B as [out, r]. Where a module of HF's fuses several of ours, its A is the A of each of them
on the way in; on the way out the parts' A follow each other and B has a block for each, which computes the same.
Experts are stacked: A as [E r, in], expert by expert, and B as [out, r E], where the expert changes fastest.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jax import Array

from jaxpost.models.lora_targets import Target

KINDS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "base_layer.weight": "base",
    "weight": "whole",
}
INNER = ".base_layer"  # of two parameters of a module, PEFT wraps the first one inside


class Part(NamedTuple):
    """What hangs at a place in one layer: A [..., in, r], B [..., r, out] and the magnitude [out] of DoRA."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None


class Entry(NamedTuple):
    """What the name of a tensor says.

    Attributes:
        targets: our places that it is for.
        layer: their layer; 0 where there are none.
        expert: the expert; None where it is no expert's, or all experts'.
        kind: one of KINDS' values.
    """

    targets: tuple[Target, ...]
    layer: int
    expert: int | None
    kind: str


def modules_of(targets: Iterable[Target], parameters: Iterable[str]) -> dict[str, tuple[Target, ...]]:
    """The places for each of PEFT's modules; `{}` stands for the layer, then the expert.

    Args:
        targets: of the model.
        parameters: the names that the adapter targets as parameters, which tell what the module of experts is for.
    """
    leaves = {name.rpartition(".")[2] for name in parameters}
    modules: dict[str, tuple[Target, ...]] = {}
    for target in targets:
        names = {target.alias} if target.alias else {target.name}
        if target.is_parameter and (not target.is_expert or target.name.rpartition(".")[2] in leaves):
            names.add(module_name(target, leaves))
        for name in names:
            modules[name] = (*modules.get(name, ()), target)
    return modules


def module_name(target: Target, leaves: set[str]) -> str:
    """PEFT's module for a place: for a parameter its owner. `leaves` are the last names of the targeted parameters."""
    if not target.is_parameter:
        return target.name
    owner, _, leaf = target.name.rpartition(".")
    return owner + INNER if leaf == "gate_up_proj" and "down_proj" in leaves else owner


def read_name(name: str, modules: Mapping[str, tuple[Target, ...]]) -> Entry | None:
    """What a tensor is, by its name without PEFT's prefix; None if it is nothing of this model's."""
    module, kind = next(
        ((name[: -len(end) - 1], kind) for end, kind in KINDS.items() if name.endswith(f".{end}")), (name, "")
    )
    template = re.sub(r"\.(0|[1-9]\d{0,5})(?=\.|$)", ".{}", module)
    if not kind or template not in modules:
        return None
    layer, expert = [*map(int, re.findall(r"\.(\d+)(?=\.|$)", module)), None, None][:2]
    return Entry(modules[template], layer or 0, expert, kind)


def from_peft(a: np.ndarray, b: np.ndarray, num_experts: int | None) -> tuple[np.ndarray, np.ndarray]:
    """A [..., in, r] and B [..., r, out] of a module from PEFT's; `num_experts` where they are stacked."""
    if num_experts is None:
        return a.T, b.T
    a = a.reshape(num_experts, -1, a.shape[-1]).transpose(0, 2, 1)
    return a, b.reshape(b.shape[0], -1, num_experts).transpose(2, 1, 0)


def to_peft(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A and B of a module, experts stacked."""
    if a.ndim == 2:
        return a.T, b.T
    return a.transpose(0, 2, 1).reshape(-1, a.shape[1]), b.transpose(2, 1, 0).reshape(b.shape[2], -1)


def fused(parts: Mapping[Target, Part], num_outputs: int) -> Part:
    """What hangs at one module of HF's, from what hangs at our parts of it; it computes the same."""
    a = np.concatenate([part.a for part in parts.values()], axis=-1)
    first = next(iter(parts.values()))
    b = np.zeros((*first.b.shape[:-2], a.shape[-1], num_outputs), a.dtype)
    magnitude = None if first.magnitude is None else np.ones(num_outputs, a.dtype)
    row = 0
    for target, part in parts.items():
        outputs = slice(None) if target.part is None else slice(*target.part)
        b[..., row : row + part.a.shape[-1], outputs] = part.b
        row += part.a.shape[-1]
        if magnitude is not None and part.magnitude is not None:
            magnitude[outputs] = part.magnitude
    return Part(a, b, magnitude)


def on_host(array: Array) -> np.ndarray:
    """The whole array in this process's memory (a collective where it is spread over processes)."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
