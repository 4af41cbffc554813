"""Where arrays live: the mesh axes, one table for parameters, `put` for batches, `constrain` for activations.

The mesh has the axes `data` (copies of the model), `fsdp` (slices of the parameters), `expert` (likewise, but whole
experts of a mixture), `context` (likewise, and slices of rows) and `tensor` (slices inside a layer). The batch is split
over data x fsdp x expert, so that an `expert` axis is one more of fsdp to all that is no expert, and to a model without
experts. The tokens of these rows are split further over `context`, wherever one does not look at others; attention, in
which they do, has its heads split instead, so that between the two tokens move and nothing is computed twice
(DeepSpeed-Ulysses: Jacobs et al., 2023, arXiv:2309.14509). Axes are of type Auto: XLA propagates what the table and
`constrain` pin down.
"""

import itertools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost.errors import ConfigError
from jaxpost.options import Group, nearest, option

AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
TOKEN_AXES = (*BATCH_AXES, "context")

# Logical axis of a parameter or an activation -> the mesh axes that it is split over, but for those that a dimension
# before it is split over.
MESH_AXES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "batch": BATCH_AXES,
    "tokens": TOKEN_AXES,
    "experts": ("expert",),
    "embed": ("fsdp", "expert", "context"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "attended": ("tensor", "context"),
    "mlp": ("tensor",),
}

# Parameter suffix -> logical axes; the first match counts. A parameter under `layers.` has the layer axis in front,
# which is never split.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embed.embedding": ("vocab", "embed"),
    "head.kernel": ("embed", "vocab"),
    "router.kernel": ("embed", None),
    "shared_share.kernel": ("embed", None),
    "experts.gate.kernel": ("experts", "embed", "mlp"),
    "experts.up.kernel": ("experts", "embed", "mlp"),
    "experts.down.kernel": ("experts", "mlp", "embed"),
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
# Part of an adapter (jaxpost/models/lora.py) -> likewise, of the kernel beside which it hangs; a scale is one a layer.
ADAPTER_PARTS: dict[str, tuple[int | None, ...]] = {
    **dict.fromkeys(["lora_a", "initial_a"], (-2, None)),
    **dict.fromkeys(["lora_b", "initial_b"], (None, -1)),
    "magnitude": (-1,),
    "scale": (),
    "kernel": (-2, -1),
}
BESIDE = {"embed.adapter": "embed.embedding", "embed.head_adapter": "head.kernel"}  # others: a `kernel`

HOST = "pinned_host"  # JAX's name of the memory of the machine that a device is in

_log = logging.getLogger("jaxpost")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged."""

    help_group = Group.DEVICES

    mesh: str | None = option(
        None,
        f"Mesh axes ({', '.join(AXES)}), e.g. fsdp=8 or fsdp=4,tensor=2; one may be -1. Default: fsdp=all devices.",
        may_change=True,
    )


def mesh_of(arrays: Any) -> Mesh:
    """The mesh that arrays lie on; that of this process's first device where they lie on none."""
    sharding = jax.tree.leaves(arrays)[0].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return make_mesh(devices=jax.local_devices()[:1])


def make_mesh(spec: str | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Build the mesh that `spec` describes, e.g. `data=2,fsdp=-1`; axes that are not named have size 1.

    Args:
        spec: comma-separated `axis=size`; None puts every device on `fsdp`.
        devices: the devices to use; all of them by default.

    Raises:
        ConfigError: unknown or repeated axis, malformed size, or a product that is not the number of devices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = _parse_mesh(spec or "fsdp=-1")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"--mesh {spec}: only one axis may be -1")
    if free:
        others = -math.prod(sizes.values())
        if len(devices) % others:
            raise ConfigError(f"--mesh {spec} needs a multiple of {others} devices, here are {len(devices)}")
        sizes[free[0]] = len(devices) // others
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"--mesh {spec} needs {math.prod(sizes.values())} devices, here are {len(devices)}")
    # Neighbours on a TPU's torus stay neighbours, also where an axis is a part of one of the torus's.
    grid = create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _parse_mesh(spec: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in AXES:
            raise ConfigError(f"--mesh {spec}: unknown axis {axis!r}{nearest(axis, AXES)}; axes are {', '.join(AXES)}")
        if axis in sizes:
            raise ConfigError(f"--mesh {spec}: {axis} is given twice")
        if not re.fullmatch(r"-1|[1-9][0-9]{0,8}", size):
            raise ConfigError(f"--mesh {spec}: the size of {axis} must be a positive number or -1, not {size!r}")
        sizes[axis] = int(size)
    return dict.fromkeys(AXES, 1) | sizes


def batch_groups(mesh: Mesh | AbstractMesh) -> int:
    """Number of groups of devices that see different rows (data x fsdp x expert)."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def token_groups(mesh: Mesh | AbstractMesh) -> int:
    """Number of groups of devices that see different tokens: likewise, x context."""
    return math.prod(mesh.shape[axis] for axis in TOKEN_AXES)


def path_of(key_path: Any) -> str:
    """`layers.attention.query.kernel` from a pytree key path."""
    return jax.tree_util.keystr(key_path, simple=True, separator=".")


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, *, gathered: bool = False) -> P:
    """The PartitionSpec of the parameter (or its optimizer moment) that ends in `path`'s suffix.

    A dimension that its mesh axes do not divide is split over the part of them that does, which may be none, with one
    log line. Optimizer state with a dimension summed away has size 1 there, which is replicated in silence. `gathered`
    leaves out the axes that are gathered before the parameter is used.

    Raises:
        ConfigError: no row of the table matches; silence would replicate a large array on every device.
    """
    if not shape:
        return P()
    logical = _logical_axes(path)
    if logical is None:
        raise ConfigError(f"parameter {path} has no row in the sharding table (jaxpost/sharding.py: PARAMETERS)")
    if gathered:
        logical = tuple(None if name == "embed" else name for name in logical)
    return layout_spec((*[None] * (len(shape) - len(logical)), *logical), shape, mesh, path)


def mesh_axes(
    name: str | None, dim: int, mesh: Mesh | AbstractMesh, *, taken: Sequence[str] = (), path: str = ""
) -> tuple[str, ...]:
    """The mesh axes that a dimension of this size is split over; none of size 1.

    Args:
        name: its logical axis.
        dim: its size.
        mesh: of the array.
        taken: axes that other dimensions of the array are split over.
        path: of a parameter, to log what is not split as the table has it.
    """

    def size(axes: Sequence[str]) -> int:
        return math.prod(mesh.shape[axis] for axis in axes)

    wanted = tuple(axis for axis in MESH_AXES[name] if mesh.shape[axis] > 1 and axis not in taken)
    parts = (part for count in range(len(wanted), -1, -1) for part in itertools.combinations(wanted, count))
    found = max((part for part in parts if dim % size(part) == 0), key=size)
    if path and found != wanted and dim > 1:
        whole, instead = (" x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes) for axes in (wanted, found))
        outcome = f"split over {instead} alone" if found else "replicated"
        _log.info("%s: %d is not a multiple of %s, %s", path, dim, whole, outcome)
    return found


def layout_spec(logical: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, path: str = "") -> P:
    """Where each dimension of an array goes, by their logical axes.

    A mesh axis splits the first one of those that name it and that it divides.
    """
    taken: list[str] = []
    entries = []
    for name, dim in zip(logical, shape, strict=True):
        axes = mesh_axes(name, dim, mesh, taken=taken, path=path)
        taken.extend(axes)
        entries.append(axes)
    return P(*entries)


def _logical_axes(path: str) -> tuple[str | None, ...] | None:
    """Of a parameter, or of a part of a quantised kernel or an adapter; None if no row of the tables matches."""
    kernel, _, part = path.rpartition(".")
    parts = PARTS if kernel.endswith(".kernel") else ADAPTER_PARTS if kernel.endswith("adapter") else {}
    if part in parts:
        usual = kernel.removesuffix("adapter") + "kernel" if parts is ADAPTER_PARTS else kernel
        axes = _logical_axes(next((beside for place, beside in BESIDE.items() if kernel.endswith(place)), usual))
        own = () if axes is None else tuple(None if dim is None else axes[dim] for dim in parts[part])
        return axes and own and (*axes[:-2], *own)
    return next((axes for suffix, axes in PARAMETERS.items() if path.endswith(suffix)), None)


def shardings(tree: Any, mesh: Mesh, *, gathered: bool = False) -> Any:
    """A tree of NamedShardings like `tree` (arrays or ShapeDtypeStructs: parameters, optimizer or train state)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, parameter_spec(path_of(path), leaf.shape, mesh, gathered=gathered)), tree
    )


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Where the columns of a batch are: the leading axis is split over BATCH_AXES."""
    return NamedSharding(mesh, P(BATCH_AXES))


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Place this process's rows of a batch on the mesh; the leading axis is split over BATCH_AXES."""
    sharding = rows_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, column) for name, column in batch.items()}


def put_whole(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Likewise a batch that every process has all rows of: each puts those of its own devices there."""
    sharding = rows_sharding(mesh)
    return {
        name: jax.make_array_from_callback(column.shape, sharding, column.__getitem__) for name, column in batch.items()
    }


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pin an activation's layout, e.g. `constrain(h, "batch", None, None)`; nothing outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, layout_spec(logical, x.shape, mesh))


def constrain_parameter(path: str, x: jax.Array) -> jax.Array:
    """Lay a parameter out as it is used: see `parameter_spec`, gathered."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not jnp.issubdtype(x.dtype, jnp.number):
        return x
    return jax.lax.with_sharding_constraint(x, parameter_spec(path, x.shape, mesh, gathered=True))


def on_devices(tree: Any) -> Any:
    """Arrays of a program, those that are in the host's memory fetched from there."""

    def fetched(x: jax.Array) -> jax.Array:
        is_away = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if is_away else x

    return jax.tree.map(fetched, tree)


def by_rows(function: Callable[..., Any], weights: Any, *rows: Any, sums: bool = False, specs: Any = None) -> Any:
    """`function(weights, *rows)`, with every group of devices working on its own rows: in loops nothing moves.

    Rows are split over TOKEN_AXES; over `tensor` everything is split as it was. Rows that the groups cannot share are
    computed by all.

    Args:
        function: gives arrays whose leading axis is that of the rows; with `sums`, first a tree of sums over them.
        weights: arrays that all groups have wholly.
        rows: trees of arrays [B, ...].
        sums: whether the first of two results is to be added up over the groups.
        specs: where the weights are, if groups have but parts of them; the sums, which the function adds up itself,
            are alike.
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = jax.tree.leaves(rows)[0].shape[0]
    if mesh.empty or token_groups(mesh) == 1 or count % token_groups(mesh):
        return function(weights, *rows)

    def run(weights: Any, *rows: Any) -> Any:
        results = function(weights, *rows)
        return (jax.lax.psum(results[0], TOKEN_AXES), results[1]) if sums and specs is None else results

    split, whole = P(TOKEN_AXES), P() if specs is None else specs
    return jax.shard_map(
        run,
        in_specs=(whole, *[split] * len(rows)),
        out_specs=(whole, split) if sums else split,
        axis_names=set(TOKEN_AXES),
        check_vma=False,
    )(weights, *rows)
