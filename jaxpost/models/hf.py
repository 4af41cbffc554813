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
from jaxpost.models.families import FAMILIES, Row, read_config, rows_of
from jaxpost.models.transformer import Decoder
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
    dtype: str = "float32",
    compute: Compute | None = None,
    revision: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Decoder:
    """Load a language model from an HF folder, a hub id or a `.gguf` file.

    Args:
        name_or_path: where the model is.
        dtype: of the parameters: float32, bfloat16 or float16.
        compute: dtype, remat and kernel of the forward pass; by default the parameters' dtype, nothing recomputed.
        revision: branch, tag or commit of a hub repository.
        mesh: where to put the parameters; by default the first device.

    Returns:
        A model: `model(tokens) -> logits [B, T, V]`.

    Raises:
        ConfigError: missing or unsupported files, tensors or config fields; the message lists them.
    """
    return load(open_checkpoint(name_or_path, revision), str(name_or_path), dtype=dtype, compute=compute, mesh=mesh)


def load(
    checkpoint: Checkpoint,
    source: str,
    *,
    dtype: str = "float32",
    compute: Compute | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Decoder:
    """Build the model of an opened checkpoint; see `from_pretrained`. `source` names it in errors."""
    one_of("dtype", dtype, PARAMETER_DTYPES)
    mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    config = read_config(checkpoint.config, source)
    compute = compute or Compute(dtype=dtype)
    abstract = nnx.eval_shape(lambda: Decoder(config, compute=compute, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    shapes = nnx.to_pure_dict(state)
    check_tensors(config, checkpoint, shapes, source)
    rows = {row.path: row for row in rows_of(config)}
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

    def tensor(name: str, index: tuple[slice, ...]) -> np.ndarray:
        whole = checkpoint.read(name)
        return np.asarray((whole.T if row.transpose else whole)[index])

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if "{}" not in row.hf_name:
            return np.ascontiguousarray(tensor(row.hf_name, index), dtype=dtype)
        layers = range(*index[0].indices(shape[0]))
        first = tensor(row.hf_name.format(layers[0]), index[1:])
        out = np.empty((len(layers), *first.shape), dtype)
        for slot, layer in enumerate(layers):
            out[slot] = tensor(row.hf_name.format(layer), index[1:])
        return out

    return read


def hf_tensors(config: ModelConfig, shapes: dict[str, Any]) -> dict[str, tuple[Row, int | None, tuple[int, ...]]]:
    """Every HF tensor of this model: name -> (row, layer or None, HF shape)."""
    by_path = {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    tensors: dict[str, tuple[Row, int | None, tuple[int, ...]]] = {}
    for row in rows_of(config):
        shape = by_path.pop(row.path)
        stacked = "{}" in row.hf_name
        inner = shape[1:] if stacked else shape
        inner = inner[::-1] if row.transpose else inner
        for layer in range(shape[0]) if stacked else [None]:
            tensors[row.hf_name.format(layer)] = (row, layer, inner)
    assert not by_path, f"parameters without a row: {sorted(by_path)}"
    return tensors


def check_tensors(config: ModelConfig, checkpoint: Checkpoint, shapes: dict[str, Any], source: str) -> None:
    """Compare what the architecture needs with what the files hold, before anything is read.

    Raises:
        ConfigError: lists missing, unexpected and wrongly shaped tensors.
    """
    needed = hf_tensors(config, shapes)
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    ignored |= {name for name in checkpoint.names() if name.endswith("rotary_emb.inv_freq")}
    missing = sorted(set(needed) - checkpoint.names())
    unexpected = sorted(checkpoint.names() - set(needed) - ignored)
    wrong = [
        f"{name} {list(checkpoint.shape(name))} instead of {list(shape)}"
        for name, (_, _, shape) in needed.items()
        if name in checkpoint.names() and checkpoint.shape(name) != shape
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
    _write_safetensors(staging / "model.safetensors", model.config, weights, dtype, main)
    if not main:
        return
    architecture = FAMILIES[model.config.hf["model_type"]].architecture
    config = {**model.config.hf, "architectures": [architecture], "vocab_size": model.config.vocab_size, "dtype": dtype}
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


def _write_safetensors(path: Path, config: ModelConfig, weights: dict[str, Any], dtype: str, main: bool) -> None:
    """Stream the tensors one after the other: no host holds more than one parameter of the whole model."""
    by_path = {path_of(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    tensors = hf_tensors(config, weights)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, size = 0, np.dtype(dtype).itemsize
    for name, (_, _, shape) in tensors.items():
        end = offset + int(np.prod(shape)) * size
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path if main else os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for row, layer, _ in tensors.values():
            whole = by_path[row.path]
            value = _to_host(whole if layer is None else whole[layer])
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
