"""Hugging Face models in: weights straight from their files into their shards."""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost.models.attention import ATTENTION
from jaxpost.models.check import SCORE, check_finite, check_tensors, finite_tensors
from jaxpost.models.checkpoint import Checkpoint
from jaxpost.models.config import Compute, ModelConfig
from jaxpost.models.config_reader import ConfigReader
from jaxpost.models.families import architecture, read_config, rows_of
from jaxpost.models.memory import aligned_empty, copy, release
from jaxpost.models.nf4 import Parts
from jaxpost.models.quant import SCHEMES, collect, for_schemes, quantize
from jaxpost.models.remat import REMAT
from jaxpost.models.rows import Row
from jaxpost.models.transformer import HEADS, Decoder
from jaxpost.options import Group, check_choices, one_of, option
from jaxpost.platform import platform
from jaxpost.sharding import make_mesh, path_of, shardings

PARAMETER_DTYPES = ("float32", "bfloat16", "float16")
READERS = 4  # tensors read at a time: while one waits for the disk, others are copied

_log = logging.getLogger("jaxpost")

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Which model, and in which numbers."""

    help_group = Group.MODEL

    model_name_or_path: str | None = option(None, "Hub id, local Hugging Face folder or .gguf file.", may_change=True)
    model_revision: str = option("main", "Branch, tag or commit of a hub model.", may_change=True)
    dtype: str = option("float32", "Parameters: float32, bfloat16 or float16.", choices=PARAMETER_DTYPES)
    bf16: bool | None = option(None, "Compute in bfloat16; by default on accelerators, not on CPU.")
    gradient_checkpointing: bool = option(
        True, "Recompute activations in the backward pass to save memory.", may_change=True
    )
    remat_policy: str | None = option(
        None,
        f"What of a block's activations is not recomputed: {', '.join(REMAT)}; by default dots on CPU, full elsewhere.",
        choices=REMAT,
        may_change=True,
    )
    attn_implementation: str = option("auto", f"Attention kernel: {', '.join(ATTENTION)}.", choices=ATTENTION)
    allow_nonfinite_weights: bool = option(False, "Load a model even if its weights hold NaN or infinity.")

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def rows_may_branch(self) -> bool:
        """Whether a prompt may be read once for several completions."""
        return False

    def compute(self) -> Compute:
        """How the forward and backward pass are carried out on this machine."""
        on_cpu = platform() == "cpu"
        bf16 = not on_cpu if self.bf16 is None else self.bf16
        # Host memory is ample, and matrix products are what a CPU is slow at: keep their results there.
        remat = self.remat_policy or ("dots" if on_cpu else "full")
        return Compute(
            dtype="bfloat16" if bf16 else "float32",
            remat=remat if self.gradient_checkpointing else "none",
            attention=self.attn_implementation,
            branches=self.rows_may_branch,
        )


def load(
    checkpoint: Checkpoint,
    source: str,
    *,
    head: str = "lm",
    dtype: str = "float32",
    compute: Compute | None = None,
    mesh: Mesh | None = None,
    quantization: str | None = None,
    allow_nonfinite: bool = False,
) -> Decoder:
    """Build the model of an opened checkpoint; see `models.pretrained.from_pretrained`. `source` names it in errors."""
    one_of("dtype", dtype, PARAMETER_DTYPES)
    one_of("head", head, HEADS)
    if quantization is not None:
        one_of("quantization", quantization, tuple(SCHEMES))
    mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    config = read_config(checkpoint.config, source)
    architecture(config, head, source)
    compute = compute or Compute(dtype=dtype)
    new = partial(Decoder, config, head=head, compute=compute)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: new(rngs=nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)
    check_tensors(config, head, checkpoint, parameter_shapes(shapes), source)
    rows = {row.path: row for row in rows_of(config, head)}
    finite: dict[str, np.ndarray] = {}

    def parameter(path: Any, leaf: Any, sharding: NamedSharding) -> Array | Parts:
        row = rows[path_of(path)]
        if row.hf_name == SCORE and SCORE not in checkpoint.names():
            return _new_head(config, leaf.shape, sharding, dtype, source)
        if quantization is not None and for_schemes(row.path):
            flags: list[int] = []
            kernels = _one_by_one(checkpoint, row, leaf.shape, sharding, np.dtype(dtype), readers, flags)
            parts = collect(kernels, row.path, leaf.shape, quantization, mesh)
            finite[row.path] = np.reshape(flags, leaf.shape[: row.stacked])
            return parts
        return _assemble(checkpoint, row, leaf.shape, sharding, np.dtype(dtype), readers.map)

    with ThreadPoolExecutor(READERS) as readers:
        weights = jax.tree_util.tree_map_with_path(parameter, shapes, shardings(shapes, mesh))
    if not allow_nonfinite:
        check_finite(weights, finite, rows, mesh, source)
    if quantization is not None:
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: quantize(new(rngs=nnx.Rngs(0)), quantization)))
    return nnx.merge(graphdef, weights)


def place(model: Decoder, compute: Compute, mesh: Mesh) -> Decoder:
    """Lay a model's parameters out on `mesh`, in place, and let it compute as `compute` says."""
    weights = nnx.to_pure_dict(nnx.state(model))
    nnx.update(model, jax.device_put(weights, shardings(weights, mesh)))
    model.compute = compute
    return model


def _assemble(
    checkpoint: Checkpoint,
    row: Row,
    shape: tuple[int, ...],
    sharding: NamedSharding,
    dtype: np.dtype,
    each: Callable[..., Any],
) -> Array:
    """One parameter: each of its HF tensors is read once, cast, and copied to where its slices belong.

    Only this process's shards are ever in its memory; on a CPU they are the parameter itself.
    """

    def bounds(index: Any) -> Bounds:
        return tuple(part.indices(dim)[:2] for part, dim in zip(index, shape, strict=True))

    indices = set(map(bounds, sharding.addressable_devices_indices_map(shape).values()))
    shards = {index: aligned_empty([stop - start for start, stop in index], dtype) for index in indices}

    def fill(at: tuple[int, ...]) -> None:
        tensor = checkpoint.read(row.hf_name.format(*at))
        part = tensor if row.part is None else tensor[row.part.start : row.part.stop]
        for index, shard in shards.items():
            stack, inner = index[: row.stacked], tuple(slice(*bound) for bound in index[row.stacked :])
            if all(start <= i < stop for i, (start, stop) in zip(at, stack, strict=True)):  # experts are split
                place = tuple(i - start for i, (start, _) in zip(at, stack, strict=True))
                with np.errstate(over="ignore", invalid="ignore"):  # `check_finite` says it better
                    copy(shard[place], (part.T if row.transpose else part)[inner])
        release(tensor)

    list(each(fill, np.ndindex(*shape[: row.stacked])))
    return jax.make_array_from_callback(shape, sharding, lambda index: shards[bounds(index)])


def _one_by_one(
    checkpoint: Checkpoint,
    row: Row,
    shape: tuple[int, ...],
    sharding: NamedSharding,
    dtype: np.dtype,
    readers: ThreadPoolExecutor,
    finite: list[int],
) -> Iterator[Array]:
    """The kernels [in, out] of a stack, in order, a few read ahead; notes in `finite` which are."""
    layout = NamedSharding(sharding.mesh, P(*sharding.spec[row.stacked :]))

    def read(at: tuple[int, ...]) -> Array:
        single = row._replace(hf_name=row.hf_name.format(*at))
        return _assemble(checkpoint, single, shape[row.stacked :], layout, dtype, map)

    places, waiting = np.ndindex(*shape[: row.stacked]), deque()
    while True:
        waiting.extend(readers.submit(read, at) for at in itertools.islice(places, READERS - len(waiting)))
        if not waiting:
            return
        kernel = waiting.popleft().result()
        finite.append(int(finite_tensors((kernel,), ((0, layout.spec),), layout.mesh)[0]))
        yield kernel


def _new_head(config: ModelConfig, shape: tuple[int, ...], sharding: NamedSharding, dtype: str, source: str) -> Array:
    """A reward head for a language model, drawn as transformers draws it; the same on every mesh."""
    deviation = ConfigReader(config.hf, source, {}).optional_positive("initializer_range") or 0.02
    _log.info("%s has no %s: its reward head is new, normal with deviation %g", source, SCORE, deviation)

    def draw() -> Array:
        return (deviation * jax.random.normal(jax.random.key(0), shape)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)()


def parameter_shapes(weights: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter, by path."""
    return {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
