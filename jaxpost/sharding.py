"""Where arrays live: the mesh axes, one table for parameters, `put` for batches, `constrain` for activations.

The mesh has the axes `data` (copies of the model), `fsdp` (rows and slices of the parameters) and `tensor` (slices
inside a layer). The batch is split over data x fsdp. Axes are of type Auto: XLA propagates what the table and
`constrain` pin down.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost.errors import ConfigError
from jaxpost.options import nearest, option

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis of a parameter or an activation -> mesh axis.
MESH_AXES: dict[str | None, Any] = {
    None: None,
    "batch": BATCH_AXES,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
}

# Parameter suffix -> logical axes; the first match counts. A parameter under `layers.` has the layer axis in front,
# which is never split.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embed.embedding": ("vocab", "embed"),
    "head.kernel": ("embed", "vocab"),
    "router.kernel": ("embed", None),
    "shared_share.kernel": ("embed", None),
    "experts.gate.kernel": (None, "embed", "mlp"),
    "experts.up.kernel": (None, "embed", "mlp"),
    "experts.down.kernel": (None, "mlp", "embed"),
    "query.kernel": ("embed", "heads"),
    "key.kernel": ("embed", "heads"),
    "value.kernel": ("embed", "heads"),
    "out.kernel": ("heads", "embed"),
    "query.bias": ("heads",),
    "key.bias": ("heads",),
    "value.bias": ("heads",),
    "out.bias": (None,),
    "gate.kernel": ("embed", "mlp"),
    "up.kernel": ("embed", "mlp"),
    "down.kernel": ("mlp", "embed"),
    "gate.bias": ("mlp",),
    "up.bias": ("mlp",),
    "down.bias": (None,),
    "norm.scale": (None,),
}

# Part of a quantised kernel (jaxpost/models/nf4.py) -> the kernel's dimension that each of its own follows: -2 is the
# inputs, -1 the outputs. Leading dimensions are the kernel's.
PARTS: dict[str, tuple[int | None, ...]] = {
    "codes": (-2, None, -1),
    "absmax": (-2, -1),
    "absmax_low": (-2, -1),
    "absmax_step": (-2, -1),
    "integers": (-2, -1),
    "scale": (-1,),
}
# Part of an adapter (jaxpost/models/lora.py) -> likewise, of the kernel beside which it hangs.
ADAPTER_PARTS: dict[str, tuple[int | None, ...]] = {
    **dict.fromkeys(["lora_a", "initial_a"], (-2, None)),
    **dict.fromkeys(["lora_b", "initial_b"], (None, -1)),
    "magnitude": (-1,),
    "scale": (),
    "kernel": (-2, -1),
}
BESIDE = {"embed.adapter": "embed.embedding", "embed.head_adapter": "head.kernel"}  # others: a `kernel`

_log = logging.getLogger("jaxpost")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged."""

    mesh: str | None = option(
        None,
        "Mesh axes, e.g. fsdp=8 or fsdp=4,tensor=2; one may be -1. Default: fsdp=all devices.",
        may_change=True,
    )


def make_mesh(spec: str | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Build the mesh that `spec` describes, e.g. `data=2,fsdp=-1`; axes that are not named have size 1.

    Args:
        spec: comma-separated `axis=size`; None puts every device on `fsdp`.
        devices: the devices to use; all of them by default.

    Raises:
        ConfigError: unknown axis, malformed size, or a product that is not the number of devices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = _parse_mesh(spec or "fsdp=-1")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"--mesh {spec}: only one axis may be -1")
    if free:
        sizes[free[0]] = len(devices) // max(1, -math.prod(sizes.values()))
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"--mesh {spec} needs {math.prod(sizes.values())} devices, here are {len(devices)}")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _parse_mesh(spec: str) -> dict[str, int]:
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in spec.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in sizes:
            raise ConfigError(f"--mesh {spec}: unknown axis {axis!r}{nearest(axis, AXES)}; axes are {', '.join(AXES)}")
        if not size.lstrip("-").isdigit() or int(size) == 0 or int(size) < -1:
            raise ConfigError(f"--mesh {spec}: the size of {axis} must be a positive number or -1, not {size!r}")
        sizes[axis] = int(size)
    return sizes


def batch_groups(mesh: Mesh | AbstractMesh) -> int:
    """Number of groups of devices that see different rows (data x fsdp)."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def path_of(key_path: Any) -> str:
    """`layers.attention.query.kernel` from a pytree key path."""
    return jax.tree_util.keystr(key_path, simple=True, separator=".")


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The PartitionSpec of the parameter (or its optimizer moment) that ends in `path`'s suffix.

    A dimension that its mesh axis does not divide is replicated, with one log line. Optimizer state with a dimension
    summed away has size 1 there, which is replicated in silence.

    Raises:
        ConfigError: no row of the table matches; silence would replicate a large array on every device.
    """
    if not shape:
        return P()
    logical = _logical_axes(path)
    if logical is None:
        raise ConfigError(f"parameter {path} has no row in the sharding table (jaxpost/sharding.py: PARAMETERS)")
    axes: list[Any] = [None] * (len(shape) - len(logical))
    for dim, name in zip(shape[len(axes) :], logical, strict=True):
        axis = MESH_AXES[name]
        if axis is not None and dim % mesh.shape[axis]:
            if dim > 1:
                _log.info("%s: %d is not a multiple of %s=%d, replicated", path, dim, axis, mesh.shape[axis])
            axis = None
        axes.append(axis)
    return P(*axes)


def _logical_axes(path: str) -> tuple[str | None, ...] | None:
    """Of a parameter, or of a part of a quantised kernel or an adapter; None if no row of the tables matches."""
    kernel, _, part = path.rpartition(".")
    parts = PARTS if kernel.endswith(".kernel") else ADAPTER_PARTS if kernel.endswith("adapter") else {}
    if part in parts:
        usual = kernel.removesuffix("adapter") + "kernel" if parts is ADAPTER_PARTS else kernel
        axes = _logical_axes(next((beside for place, beside in BESIDE.items() if kernel.endswith(place)), usual))
        return axes and (*axes[:-2], *(None if follows is None else axes[follows] for follows in parts[part]))
    return next((axes for suffix, axes in PARAMETERS.items() if path.endswith(suffix)), None)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of NamedShardings like `tree` (arrays or ShapeDtypeStructs: parameters, optimizer or train state)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, parameter_spec(path_of(path), leaf.shape, mesh)), tree
    )


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Where the columns of a batch are: the leading axis is split over data x fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Place this process's rows of a batch on the mesh; the leading axis is split over data x fsdp."""
    sharding = rows_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, column) for name, column in batch.items()}


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pin an activation's layout, e.g. `constrain(h, "batch", None, None)`; nothing outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = [MESH_AXES[name] for name in logical]
    sizes = [
        math.prod(mesh.shape[a] for a in (axis if isinstance(axis, tuple) else (axis,))) if axis else 1 for axis in axes
    ]
    return jax.lax.with_sharding_constraint(
        x, P(*(axis if dim % size == 0 else None for axis, dim, size in zip(axes, x.shape, sizes, strict=True)))
    )
