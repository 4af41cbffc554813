"""Hugging Face models in: weights straight from their files into their shards."""

import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost.errors import ConfigError
from jaxpost.models.attention import KERNELS
from jaxpost.models.checkpoint import Checkpoint, open_checkpoint
from jaxpost.models.config import Compute, ModelConfig
from jaxpost.models.config_reader import ConfigReader
from jaxpost.models.families import architecture, read_config, rows_of
from jaxpost.models.memory import aligned_empty, copy, release
from jaxpost.models.rows import Row, hf_tensors
from jaxpost.models.transformer import HEADS, Decoder
from jaxpost.options import one_of, option
from jaxpost.sharding import make_mesh, path_of, shardings

PARAMETER_DTYPES = ("float32", "bfloat16", "float16")
SCORE, LM_HEAD, EMBEDDING = "score.weight", "lm_head.weight", "model.embed_tokens.weight"
READERS = 4  # tensors read at a time: while one waits for the disk, others are copied
COMPARED_ROWS = 1024

_log = logging.getLogger("jaxpost")

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Which model, and in which numbers."""

    model_name_or_path: str | None = option(None, "Hub id, local Hugging Face folder or .gguf file.")
    model_revision: str = option("main", "Branch, tag or commit of a hub model.")
    dtype: str = option("float32", "Parameters: float32, bfloat16 or float16.")
    bf16: bool | None = option(None, "Compute in bfloat16; by default on accelerators, not on CPU.")
    gradient_checkpointing: bool = option(True, "Recompute activations in the backward pass to save memory.")
    attn_implementation: str = option("auto", "Attention kernel: auto or xla.")
    allow_nonfinite_weights: bool = option(False, "Load a model even if its weights hold NaN or infinity.")

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, PARAMETER_DTYPES)
        one_of("attn_implementation", self.attn_implementation, tuple(KERNELS))

    def compute(self) -> Compute:
        """How the forward and backward pass are carried out on this machine."""
        on_cpu = jax.default_backend() == "cpu"
        bf16 = not on_cpu if self.bf16 is None else self.bf16
        # Host memory is ample, and matrix products are what a CPU is slow at: keep their results there.
        remat = ("dots" if on_cpu else "full") if self.gradient_checkpointing else "none"
        return Compute(dtype="bfloat16" if bf16 else "float32", remat=remat, attention=self.attn_implementation)


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    head: str = "lm",
    dtype: str = "float32",
    compute: Compute | None = None,
    revision: str | None = None,
    mesh: Mesh | None = None,
    allow_nonfinite: bool = False,
) -> Decoder:
    """Load a language model or a reward model from an HF folder, a hub id or a `.gguf` file.

    Args:
        name_or_path: where the model is.
        head: `lm`, or `reward`: a score a token, new where the checkpoint is a language model.
        dtype: of the parameters: float32, bfloat16 or float16.
        compute: dtype, remat and kernel of the forward pass; by default the parameters' dtype, nothing recomputed.
        revision: branch, tag or commit of a hub repository.
        mesh: where to put the parameters; by default the first device.
        allow_nonfinite: accept weights that are NaN or infinite.

    Returns:
        A model: `model(tokens) -> logits [B, T, V]`, or scores [B, T] with a reward head.

    Raises:
        ConfigError: missing or unsupported files, tensors or config fields, or weights that are not finite; the
            message lists them.
    """
    checkpoint = open_checkpoint(name_or_path, revision)
    return load(
        checkpoint,
        str(name_or_path),
        head=head,
        dtype=dtype,
        compute=compute,
        mesh=mesh,
        allow_nonfinite=allow_nonfinite,
    )


def load(
    checkpoint: Checkpoint,
    source: str,
    *,
    head: str = "lm",
    dtype: str = "float32",
    compute: Compute | None = None,
    mesh: Mesh | None = None,
    allow_nonfinite: bool = False,
) -> Decoder:
    """Build the model of an opened checkpoint; see `from_pretrained`. `source` names it in errors."""
    one_of("dtype", dtype, PARAMETER_DTYPES)
    one_of("head", head, HEADS)
    mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    config = read_config(checkpoint.config, source)
    architecture(config, head, source)
    compute = compute or Compute(dtype=dtype)
    abstract = nnx.eval_shape(lambda: Decoder(config, head=head, compute=compute, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    shapes = nnx.to_pure_dict(state)
    check_tensors(config, head, checkpoint, shapes, source)
    rows = {row.path: row for row in rows_of(config, head)}

    def parameter(path: Any, leaf: Any, sharding: NamedSharding) -> Array:
        row = rows[path_of(path)]
        if row.hf_name == SCORE and SCORE not in checkpoint.names():
            return _new_head(config, leaf.shape, sharding, dtype, source)
        return _assemble(checkpoint, row, leaf.shape, sharding, np.dtype(dtype), readers.map)

    with ThreadPoolExecutor(READERS) as readers:
        weights = jax.tree_util.tree_map_with_path(parameter, shapes, shardings(shapes, mesh))
    if not allow_nonfinite:
        _check_finite(weights, rows, mesh, source)
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
            inner = tuple(slice(*bound) for bound in index[row.stacked :])
            with np.errstate(over="ignore", invalid="ignore"):  # `_check_finite` says it better
                copy(shard[at], (part.T if row.transpose else part)[inner])
        release(tensor)

    list(each(fill, np.ndindex(*shape[: row.stacked])))
    return jax.make_array_from_callback(shape, sharding, lambda index: shards[bounds(index)])


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


def check_tensors(config: ModelConfig, head: str, checkpoint: Checkpoint, weights: Any, source: str) -> None:
    """Compare what the architecture needs with what the files hold, before anything is loaded.

    Raises:
        ConfigError: lists missing, unexpected and wrongly shaped tensors; the files hold a model with another head.
    """
    rows, shapes, names = rows_of(config, head), parameter_shapes(weights), checkpoint.names()
    most = max(math.prod(shapes[row.path][: row.stacked]) for row in rows)
    if most > len(names):  # before a name is made for each
        raise ConfigError(
            f"{source}: config.json asks for {most} tensors of one kind, the files hold {len(names)} in all"
        )
    needed = hf_tensors(rows, shapes)
    if head == "lm" and SCORE in names:
        raise ConfigError(f'{source} is a reward model (it has {SCORE}); load it with head="reward"')
    is_classifier = "ForSequenceClassification" in str(config.hf.get("architectures"))
    may_lack = set() if is_classifier else {SCORE}
    ignored = {LM_HEAD} if config.tie_embeddings or head == "reward" else set()
    ignored |= {name for name in names if name.endswith("rotary_emb.inv_freq")}
    missing = sorted(set(needed) - names - may_lack)
    unexpected = sorted(names - set(needed) - ignored)
    wrong = [
        f"{name} {list(checkpoint.shape(name))} instead of {list(tensor.shape)}"
        for name, tensor in needed.items()
        if name in names and checkpoint.shape(name) != tensor.shape
    ]
    problems = [
        f"{kind}: {_few(names, 5)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise ConfigError(f"{source}: the weights do not fit config.json; {'; '.join(problems)}")
    if config.tie_embeddings and head == "lm" and LM_HEAD in names:
        _check_tied(checkpoint, source)


def _check_tied(checkpoint: Checkpoint, source: str) -> None:
    """Raise ConfigError if a head that would not be loaded says something else than the embedding."""
    embedding, head = checkpoint.read(EMBEDDING), checkpoint.read(LM_HEAD)
    same = embedding.shape == head.shape and all(
        np.array_equal(embedding[rows], head[rows], equal_nan=True)
        for rows in (slice(start, start + COMPARED_ROWS) for start in range(0, len(head), COMPARED_ROWS))
    )
    release(embedding)
    release(head)
    if not same:
        raise ConfigError(
            f"{source}: config.json ties the head to the embedding, but {LM_HEAD} differs from {EMBEDDING}; "
            "set tie_word_embeddings to false, or remove the tensor that is wrong"
        )


def _check_finite(weights: Any, rows: dict[str, Row], mesh: Mesh, source: str) -> None:
    """Raise ConfigError if a weight is NaN or infinite."""
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    kinds = tuple((rows[path].stacked, leaf.sharding.spec) for path, leaf in leaves.items())
    finite = dict(zip(leaves, jax.device_get(_finite(tuple(leaves.values()), kinds, mesh)), strict=True))
    bad = sorted({rows[path].hf_name.format(*at) for path, flags in finite.items() for at in np.argwhere(flags == 0)})
    if bad:
        raise ConfigError(
            f"{source}: NaN or infinity (in {jax.tree.leaves(weights)[0].dtype}) in {_few(bad, 3)}; the files are "
            "damaged or their training had diverged: take another checkpoint, or --allow_nonfinite_weights true"
        )


@partial(jax.jit, static_argnums=(1, 2))
def _finite(parameters: tuple[Array, ...], kinds: tuple[tuple[int, P], ...], mesh: Mesh) -> tuple[Array, ...]:
    """1 for each HF tensor that is finite, else 0; `kinds` are the parameters' stacked axes and layouts.

    Each device judges its own shards, since a maximum over devices may leave out NaN, which one over an array does not.
    """

    def judge(*shards: Array) -> tuple[Array, ...]:
        found = []
        for shard, (num_stacked, _) in zip(shards, kinds, strict=True):
            axes = tuple(range(num_stacked, shard.ndim))
            finite = jnp.isfinite(jnp.max(shard, axes)) & jnp.isfinite(jnp.min(shard, axes))
            found.append(jax.lax.pmin(finite.astype(jnp.int32), mesh.axis_names))
        return tuple(found)

    specs = tuple(spec for _, spec in kinds)
    return jax.shard_map(judge, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(*parameters)


def _few(names: list[str], count: int) -> str:
    """The first names, and how many there are beyond."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
