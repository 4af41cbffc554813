"""Hugging Face models out: a folder that transformers loads, streamed tensor after tensor from any mesh."""

import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Int

from jaxpost.errors import ConfigError
from jaxpost.models.families import architecture, rows_of
from jaxpost.models.memory import copy
from jaxpost.models.publish import CONFIG, INDEX, WEIGHTS, replacing
from jaxpost.models.quant import check_dense
from jaxpost.models.rows import HFTensor, hf_tensors
from jaxpost.models.transformer import Decoder
from jaxpost.sharding import path_of

SHARD = "model-{:05d}-of-{:05d}.safetensors"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
BLOCK_BYTES = 2**26  # of a tensor in host memory
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# Fields that are not true of what is exported: dtype's other name, code that stays behind, an encoding that is undone.
DROPPED = frozenset(["torch_dtype", "auto_map", "quantization_config"])


def save_pretrained(
    model: Decoder,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    generation_config: dict[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a folder that transformers loads: safetensors, config, generation config, tokenizer, chat template.

    The files are written to a new folder beside `path`, which then takes its place. If `path` holds files, the new ones
    are moved in instead, and the weights of a model that was there are removed; no other file is. An interruption
    leaves what was there before, or a folder without config.json, which nothing takes for a model: never two models
    mixed. Every process must call this; the first one writes.

    Args:
        model: the model; its parameters keep their dtype.
        tokenizer: a transformers tokenizer, or None.
        path: the folder.
        generation_config: contents of generation_config.json, if any.
        max_shard_size: the most bytes of one file: a number, or a text such as 5GB or 200MB (powers of ten).

    Raises:
        ConfigError: `path` is a file; `max_shard_size` is no size; the model has adapters or quantised kernels.
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    if model.adapters is not None:
        raise ConfigError(
            "the model has adapters: save_adapter writes the one in use; merge_adapter(model) can be saved"
        )
    check_dense(model)
    limit, target = parse_size(max_shard_size), Path(os.path.realpath(os.path.expanduser(path)))
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; give a folder to save the model in")
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    parameters: dict[str, Array] = {path_of(key): leaf for key, leaf in leaves}
    shapes = {key: leaf.shape for key, leaf in parameters.items()}
    tensors = hf_tensors(rows_of(model.config, model.head_kind), shapes)
    streams = (_blocks(tensor, parameters) for tensor in tensors.values())
    entries = {
        name: _Entry(parameters[tensor.pieces[0].row.path].dtype, tensor.shape) for name, tensor in tensors.items()
    }
    if jax.process_index() != 0:
        for _ in itertools.chain.from_iterable(streams):
            pass
        return
    with replacing(target) as folder:
        _write_weights(folder, entries, streams, limit)
        _write_json(folder / CONFIG, exported_config(model, tokenizer))
        if generation_config:
            _write_json(folder / "generation_config.json", generation_config)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def parse_size(size: int | str) -> int:
    """The bytes that `5GB`, `1.5MB`, `200KB` or a number means, as transformers reads them.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB)?", str(size).strip().upper())
    count = int(float(match[1]) * UNITS.get(match[2], 1)) if match else 0
    if count < 1:
        raise ConfigError(f"max_shard_size is {size!r}; it takes a number of bytes or a size such as 5GB, 500MB, 200KB")
    return count


def exported_config(model: Decoder, tokenizer: Any) -> dict[str, Any]:
    """The `config.json` of a model: the one it was made from, with what is true of it now."""
    config, head = model.config, model.head_kind
    fields = {name: value for name, value in config.hf.items() if name not in DROPPED}
    fields |= {"architectures": [architecture(config, head)], "vocab_size": config.vocab_size}
    fields["dtype"] = str(model.embed.embedding[...].dtype)
    if head == "reward":
        # One label is how transformers knows that the head has one output.
        fields |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        fields.pop("num_labels", None)
        if tokenizer is not None and tokenizer.pad_token_id is not None:
            fields["pad_token_id"] = tokenizer.pad_token_id
    return fields


@jax.jit
def _slice(parameter: Array, at: tuple[Int[Array, ""], ...]) -> Array:
    """`parameter[at]`, compiled once for all indices."""
    inner = parameter.shape[len(at) :]
    starts, sizes = (*at, *[0] * len(inner)), (*[1] * len(at), *inner)
    return jax.lax.dynamic_slice(parameter, starts, sizes).reshape(inner)


def _blocks(tensor: HFTensor, parameters: Mapping[str, Array]) -> Iterator[np.ndarray]:
    """An HF tensor in this process's memory, a block of rows at a time."""
    for row, at in tensor.pieces:
        piece = _slice(parameters[row.path], at) if at else parameters[row.path]
        shape = piece.shape[::-1] if row.transpose else piece.shape
        shards = [(index[::-1], part.T) if row.transpose else (index, part) for index, part in _shards(piece)]
        step = max(1, BLOCK_BYTES * shape[0] // piece.nbytes)
        for start in range(0, shape[0], step):
            block = np.empty((min(step, shape[0] - start), *shape[1:]), piece.dtype)
            for (rows, *columns), part in shards:
                begin, end, _ = rows.indices(shape[0])
                low, high = max(begin, start), min(end, start + len(block))
                if low < high:
                    copy(block[(slice(low - start, high - start), *columns)], part[low - begin : high - begin])
            yield block


def _shards(array: Array) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Parts that make up the array, and where they belong (a collective where it is spread over processes)."""
    if array.is_fully_addressable:
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                yield shard.index, np.asarray(shard.data)
    else:
        from jax.experimental import multihost_utils

        yield (slice(None),) * array.ndim, np.asarray(multihost_utils.process_allgather(array, tiled=True))


class _Entry(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def _write_weights(
    folder: Path, entries: Mapping[str, _Entry], tensors: Iterator[Iterator[np.ndarray]], limit: int
) -> None:
    """Stream the tensors, which come in the order of the entries, into one file, or into several with an index."""
    runs = _split({name: entry.nbytes for name, entry in entries.items()}, limit)
    files = [SHARD.format(number, len(runs)) for number in range(1, len(runs) + 1)] if len(runs) > 1 else [WEIGHTS]
    weight_map = {name: file for file, run in zip(files, runs, strict=True) for name in run}
    for file, run in zip(files, runs, strict=True):
        with open(folder / file, "wb") as opened:
            opened.write(_header({name: entries[name] for name in run}))
            for block in itertools.chain.from_iterable(itertools.islice(tensors, len(run))):
                begin = opened.tell()
                opened.write(block.reshape(-1).view(np.uint8).data)
                if sys.platform == "linux":  # the disk need not wait for the next block
                    os.posix_fadvise(opened.fileno(), begin, block.nbytes, os.POSIX_FADV_DONTNEED)
    if len(runs) > 1:
        totals = {
            "total_parameters": sum(entry.size for entry in entries.values()),
            "total_size": sum(entry.nbytes for entry in entries.values()),
        }
        _write_json(folder / INDEX, {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))})


def _header(entries: Mapping[str, _Entry]) -> bytes:
    """The beginning of a safetensors file, padded with spaces to a multiple of 8 bytes."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, entry in entries.items():
        end = begin + entry.nbytes
        fields[name] = {"dtype": DTYPES[str(entry.dtype)], "shape": entry.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Runs of names whose sizes add up to at most `limit`; a larger tensor is a run of its own."""
    runs: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if runs[-1] and size > room:
            runs.append([])
            room = limit
        runs[-1].append(name)
        room -= size
    return runs


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
