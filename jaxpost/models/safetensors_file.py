"""Opening a safetensors file: its tensors, and every check that keeps a damaged or hostile header from doing harm.

Source: the format's description (huggingface/safetensors, README.md). The library does not say where in the file a
tensor lies, which a view needs; so the header is read here, and no looser than the library reads it.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxpost.errors import ConfigError, one_line

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
# Bounds on the work. Parsed JSON takes up to 25 times its size; the largest published indexes and headers are smaller.
MAX_JSON_BYTES = 10_000_000
_MAX_TENSORS, _MAX_DIMS, _MAX_NAME, _MAX_DIGITS = 1 << 16, 8, 200, 40


class _Entry(NamedTuple):
    """What the header says of one tensor; the offsets count from the end of the header."""

    name: str
    dtype: str
    shape: list[int]
    begin: int
    end: int


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Views into a memory-mapped safetensors file, by name.

    Raises:
        ConfigError: not a whole, valid safetensors file, or a dtype that jaxpost does not load.
    """
    try:
        size = os.path.getsize(path)
        if size < 8:
            raise ValueError(f"it has {size} bytes, too few for a header")
        with open(path, "rb") as file:
            start, header = _read_header(file, size)
            data = np.memmap(file, dtype=np.uint8, mode="r")[start:]
        entries = [_entry(name, fields) for name, fields in header.items()]
        _check_tiling(entries, len(data))
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise ConfigError(f"{path}: not a valid safetensors file ({reason}); download or convert it again") from error
    for entry in entries:
        if entry.dtype not in DTYPES:
            raise ConfigError(f"{path}: {entry.name} is stored as {entry.dtype}; supported: {', '.join(DTYPES)}")
    return {name: data[begin:end].view(DTYPES[dtype]).reshape(shape) for name, dtype, shape, begin, end in entries}


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object that holds no key twice, only keys fit for a message, no endless number and no half character.

    Raises:
        ValueError: it is anything else.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_int=_whole_number)
        if b"\\ud" in text.lower():  # json.loads takes half of a surrogate pair, which could not be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; json.loads alone would keep the last of two equal keys."""
    value: dict[str, Any] = {}
    for key, item in pairs:
        if len(key) > _MAX_NAME or not key.isprintable():
            raise ValueError(f"it holds the key {key[:80]!r}, which is no name")
        if key in value:
            raise ValueError(f"it holds the key {key} twice")
        value[key] = item
    return value


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _read_header(file: BinaryIO, size: int) -> tuple[int, dict[str, Any]]:
    """Return where the tensors' bytes start, and what the header says of each tensor."""
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError(f"its header takes {length} bytes, but it has {size} in all, so it is incomplete")
    if length > MAX_JSON_BYTES:
        raise ValueError(f"its header takes {length} bytes; at most {MAX_JSON_BYTES} are read")
    header = parse_object(file.read(length))
    if len(header) > _MAX_TENSORS:
        raise ValueError(f"it announces {len(header)} tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ does not map names to texts")
    return 8 + length, header


def _entry(name: str, fields: Any) -> _Entry:
    """Check and return the header's entry for one tensor."""
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of tensor {name} does not consist of dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or not dtype.isidentifier() or len(dtype) > _MAX_NAME:
        raise ValueError(f"the dtype of tensor {name} is not a name")
    if not _whole_numbers(shape, least=1) or len(shape) > _MAX_DIMS:
        raise ValueError(f"the shape of tensor {name} is not a list of up to {_MAX_DIMS} positive whole numbers")
    if not _whole_numbers(offsets, least=0) or len(offsets) != 2:
        raise ValueError(f"the data_offsets of tensor {name} are not two whole numbers")
    begin, end = offsets
    if dtype in DTYPES and math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize != end - begin:
        raise ValueError(f"tensor {name} of shape {shape} and dtype {dtype} does not take {end - begin} bytes")
    return _Entry(name, dtype, shape, begin, end)


def _whole_numbers(value: Any, least: int) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= least for number in value)


def _check_tiling(entries: list[_Entry], size: int) -> None:
    """Raise ValueError unless the tensors cover `size` bytes, without overlap and without a hole."""
    at = 0
    for entry in sorted(entries, key=lambda entry: entry.begin):
        if entry.begin != at:
            problem = "overlaps another one" if entry.begin < at else "leaves a hole before it"
            raise ValueError(f"tensor {entry.name} begins at byte {entry.begin} instead of {at}: it {problem}")
        at = entry.end
    if at != size:
        raise ValueError(f"its tensors take {at} bytes, but it has {size}{' only, so it is incomplete' * (at > size)}")
