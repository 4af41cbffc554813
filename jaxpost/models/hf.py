"""Hugging Face in and out: weights straight into their shards, and back into a folder that transformers loads."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxpost.errors import ConfigError
from jaxpost.models.attention import KERNELS
from jaxpost.models.checkpoint import Checkpoint, open_checkpoint
from jaxpost.models.config import Compute, ModelConfig
from jaxpost.models.families import architecture, read_config, rows_of
from jaxpost.models.rows import HFTensor, Row, hf_tensors
from jaxpost.models.transformer import HEADS, Decoder
from jaxpost.options import one_of, option
from jaxpost.sharding import make_mesh, path_of, shardings

PARAMETER_DTYPES = ("float32", "bfloat16", "float16")
SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Which model, and in which numbers."""

    model_name_or_path: str | None = option(None, "Hub id, local Hugging Face folder or .gguf file.")
    model_revision: str = option("main", "Branch, tag or commit of a hub model.")
    dtype: str = option("float32", "Parameters: float32, bfloat16 or float16.")
    bf16: bool | None = option(None, "Compute in bfloat16; by default on accelerators, not on CPU.")
    gradient_checkpointing: bool = option(True, "Recompute activations in the backward pass to save memory.")
    attn_implementation: str = option("auto", "Attention kernel: auto or xla.")

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
    mesh: jax.sharding.Mesh | None = None,
) -> Decoder:
    """Load a language model or a reward model from an HF folder, a hub id or a `.gguf` file.

    Args:
        name_or_path: where the model is.
        head: `lm`, or `reward`: a score a token, new where the checkpoint is a language model.
        dtype: of the parameters: float32, bfloat16 or float16.
        compute: dtype, remat and kernel of the forward pass; by default the parameters' dtype, nothing recomputed.
        revision: branch, tag or commit of a hub repository.
        mesh: where to put the parameters; by default the first device.

    Returns:
        A model: `model(tokens) -> logits [B, T, V]`, or scores [B, T] with a reward head.

    Raises:
        ConfigError: missing or unsupported files, tensors or config fields; the message lists them.
    """
    checkpoint = open_checkpoint(name_or_path, revision)
    return load(checkpoint, str(name_or_path), head=head, dtype=dtype, compute=compute, mesh=mesh)


def load(
    checkpoint: Checkpoint,
    source: str,
    *,
    head: str = "lm",
    dtype: str = "float32",
    compute: Compute | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Decoder:
    """Build the model of an opened checkpoint; see `from_pretrained`. `source` names it in errors."""
    one_of("dtype", dtype, PARAMETER_DTYPES)
    mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    one_of("head", head, HEADS)
    config = read_config(checkpoint.config, source)
    architecture(config, head, source)
    compute = compute or Compute(dtype=dtype)
    abstract = nnx.eval_shape(lambda: Decoder(config, head=head, compute=compute, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    shapes = nnx.to_pure_dict(state)
    check_tensors(config, head, checkpoint, shapes, source)
    rows = {row.path: row for row in rows_of(config, head)}
    weights = jax.tree_util.tree_map_with_path(
        lambda path, leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, _reader(checkpoint, rows[path_of(path)], leaf.shape, np.dtype(dtype))
        ),
        shapes,
        shardings(shapes, mesh),
    )
    return nnx.merge(graphdef, weights)


def place(model: Decoder, compute: Compute, mesh: jax.sharding.Mesh) -> Decoder:
    """Lay a model's parameters out on `mesh`, in place, and let it compute as `compute` says."""
    weights = nnx.to_pure_dict(nnx.state(model))
    nnx.update(model, jax.device_put(weights, shardings(weights, mesh)))
    model.compute = compute
    return model


def _reader(checkpoint: Checkpoint, row: Row, shape: tuple[int, ...], dtype: np.dtype) -> Callable[[Any], np.ndarray]:
    """What `jax.make_array_from_callback` asks for one shard: only that slice is read and cast."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        starts_stops = [part.indices(dim)[:2] for part, dim in zip(index, shape, strict=True)]
        out = np.empty([stop - start for start, stop in starts_stops], dtype)
        for slot in np.ndindex(*out.shape[: row.stacked]):
            stacked = (start + offset for (start, _), offset in zip(starts_stops, slot, strict=False))
            whole = checkpoint.read(row.hf_name.format(*stacked))
            if row.part is not None:
                whole = whole[row.part.start : row.part.stop]
            out[slot] = (whole.T if row.transpose else whole)[index[row.stacked :]]
        return out

    return read


def parameter_shapes(weights: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter, by path."""
    return {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}


def check_tensors(config: ModelConfig, head: str, checkpoint: Checkpoint, weights: Any, source: str) -> None:
    """Compare what the architecture needs with what the files hold, before anything is read.

    Raises:
        ConfigError: lists missing, unexpected and wrongly shaped tensors.
    """
    needed = hf_tensors(rows_of(config, head), parameter_shapes(weights))
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    ignored |= {name for name in checkpoint.names() if name.endswith("rotary_emb.inv_freq")}
    missing = sorted(set(needed) - checkpoint.names())
    unexpected = sorted(checkpoint.names() - set(needed) - ignored)
    wrong = [
        f"{name} {list(checkpoint.shape(name))} instead of {list(tensor.shape)}"
        for name, tensor in needed.items()
        if name in checkpoint.names() and checkpoint.shape(name) != tensor.shape
    ]
    problems = [
        f"{kind}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise ConfigError(f"{source}: the weights do not fit config.json; {'; '.join(problems)}")


def save_pretrained(
    model: Decoder,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    generation_config: dict[str, Any] | None = None,
) -> None:
    """Write a folder that transformers loads: safetensors, config, generation config, tokenizer, chat template.

    The files are written beside `path` and moved in at the end, so an interrupted export leaves no half model.

    Args:
        model: the model; its parameters keep their dtype.
        tokenizer: a transformers tokenizer, or None.
        path: the folder; files of the same names in it are replaced, others are left alone.
        generation_config: contents of generation_config.json, if any.

    Raises:
        ConfigError: `path` is a file.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; give a folder to save the model in")
    main = jax.process_index() == 0
    staging = target.parent / f".{target.name}.saving"
    if main:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    weights = nnx.to_pure_dict(nnx.state(model))
    dtype = str(jax.tree.leaves(weights)[0].dtype)
    tensors = hf_tensors(rows_of(model.config, model.head_kind), parameter_shapes(weights))
    _write_safetensors(staging / "model.safetensors", tensors, weights, dtype, main)
    if not main:
        return
    name = architecture(model.config, model.head_kind)
    config = {**model.config.hf, "architectures": [name], "vocab_size": model.config.vocab_size, "dtype": dtype}
    config.pop("torch_dtype", None)
    _write_json(staging / "config.json", config)
    if generation_config:
        _write_json(staging / "generation_config.json", generation_config)
    if tokenizer is not None:
        tokenizer.save_pretrained(staging)
    target.mkdir(exist_ok=True)
    for file in staging.iterdir():
        os.replace(file, target / file.name)
    staging.rmdir()


def _write_safetensors(path: Path, tensors: dict[str, HFTensor], weights: Any, dtype: str, main: bool) -> None:
    """Stream the tensors one after the other: no host holds more than one parameter of the whole model."""
    by_path = {path_of(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size, offset = np.dtype(dtype).itemsize, 0
    for name, tensor in tensors.items():
        end = offset + tensor.size * size
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path if main else os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for row, at in (piece for tensor in tensors.values() for piece in tensor.pieces):
            value = _to_host(by_path[row.path][at])
            file.write(np.ascontiguousarray(value.T if row.transpose else value).tobytes())
        file.flush()
        if main:
            os.fsync(file.fileno())


def _to_host(array: jax.Array) -> np.ndarray:
    """The whole array on every process (a collective where it is spread over several)."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
