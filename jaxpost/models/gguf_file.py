"""Opening a GGUF file: the one place where the `gguf` package parses and dequantises, and where damage is caught.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md).
"""

import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxpost.errors import ConfigError

HF_FOLDER = "pass the model's original Hugging Face folder instead"
CONVERT = "convert the model again with a current llama.cpp"

_NEEDED = object()
# Layout of the key-value section: bytes of each scalar type, and the two types that vary in size.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
# Bounds on what is parsed. The largest vocabularies need 1.3 million values, the deepest models some thousand tensors.
_MAX_VALUES, _MAX_TENSORS, _MAX_DIMS = 1 << 21, 1 << 16, 4


class Metadata:
    """The key-value section of one file; every value is checked as it is asked for.

    Raises (every method):
        ConfigError: names the file, the key and what is wrong with its value.
    """

    def __init__(self, path: str, values: Mapping[str, Any]):
        self.path = path
        self._values = values
        self._asked: set[str] = set()

    def error(self, reason: str) -> ConfigError:
        """Return the error that names the file and `reason`, in one line."""
        return ConfigError(" ".join(f"{self.path}: {reason}".split()))

    def get(self, key: str, kind: type, default: Any = _NEEDED) -> Any:
        """Return the value of `key`, of type `kind`, or `default` where the file has none."""
        self._asked.add(key)
        if key not in self._values:
            if default is _NEEDED:
                raise self.error(f"the file has no {key}; {CONVERT}")
            return default
        value = self._values[key]
        if type(value) is not kind:
            raise self.error(f"{key} is {str(value)[:40]!r}, which is not of type {kind.__name__}; {HF_FOLDER}")
        return value

    def positive(self, key: str, kind: type, default: Any = _NEEDED) -> Any:
        """Return a number above 0 and below 2^31; a float comes back as its shortest float32 spelling."""
        value = self.get(key, kind, default)
        if value is default:
            return default
        if not (1 if kind is int else 1e-30) <= value < 2**31:
            raise self.error(f"{key} is {value}, which no model can have; {HF_FOLDER}")
        return value if kind is int else float(str(np.float32(value)))

    def array(self, key: str, kind: type, length: int | None = None, default: Any = _NEEDED) -> Any:
        """Return a list of `kind`; if `length` is given, one value for each of that many tokens."""
        values = self.get(key, list, default)
        if values is default:
            return default
        if not all(type(value) is kind for value in values):
            raise self.error(f"{key} holds values that are not of type {kind.__name__}; {HF_FOLDER}")
        if length is not None and len(values) != length:
            raise self.error(f"{key} has {len(values)} values for {length} tokens; {CONVERT}")
        return values

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """Return the id under `tokenizer.ggml.<name>_token_id`, or None where the file has none."""
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.get(key, int, None)
        if value is not None and not 0 <= value < vocab_size:
            raise self.error(f"{key} is {value}, outside of the vocabulary of {vocab_size}; {CONVERT}")
        return value

    def unread(self, prefix: str) -> list[str]:
        """Return the keys under `prefix` that nothing has asked for."""
        return sorted(key for key in self._values if key.startswith(prefix) and key not in self._asked)


def open_gguf(path: str | os.PathLike) -> tuple[Metadata, dict[str, Any]]:
    """Return the file's metadata and its tensors (`gguf.ReaderTensor`, mapped from the file) by GGUF name.

    Raises:
        ConfigError: `gguf` is not installed, or the file is not a whole, readable GGUF file.
    """
    path = os.fspath(path)
    try:
        import gguf
    except ImportError as error:
        remedy = "run: pip install 'jaxpost[gguf]'"
        raise ConfigError(f"{path}: a GGUF file needs the gguf package; {remedy}") from error
    try:
        _check_extents(path, gguf.GGML_QUANT_SIZES)
        with np.errstate(all="raise"):
            reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{path}: not a readable GGUF file ({reason}); download or convert it again") from error
    metadata = Metadata(path, values)
    if metadata.get("split.count", int, 1) > 1:
        raise metadata.error("the file is one part of several; join them first with llama-gguf-split --merge")
    _check_quantisation(metadata, reader.tensors)
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def shape(tensor: Any) -> tuple[int, ...]:
    """Return the shape as numpy counts it, [out, in] for a matrix; GGUF counts the fastest dimension first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def dequantize(tensor: Any) -> np.ndarray:
    """Return the tensor's values as float32, perhaps still mapped from the file."""
    from gguf import quants

    with np.errstate(all="ignore"):  # an infinite scale in the file is not an error of the arithmetic
        return quants.dequantize(tensor.data, tensor.tensor_type)


def _check_quantisation(metadata: Metadata, tensors: Iterable[Any]) -> None:
    """Raise ConfigError if the `gguf` package cannot dequantise a tensor, tried on one empty block of each type."""
    from gguf import GGML_QUANT_SIZES, quants

    for kind, name in {tensor.tensor_type: tensor.name for tensor in tensors}.items():
        try:
            quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            reason = f"tensor {name} has quantisation type {kind.name}, which the gguf package cannot dequantise"
            raise metadata.error(f"{reason}; convert the model to F16 or Q8_0") from error


def _check_extents(path: str, quant_sizes: Mapping[Any, tuple[int, int]]) -> None:
    """Raise ValueError unless every string, array and tensor that the header announces lies inside of the file.

    GGUFReader (0.19) slices beyond the end without noticing, and then loops as often as a damaged length says
    (https://github.com/ggml-org/llama.cpp/pull/27188).
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not start with the letters GGUF")
        (version, num_tensors, num_keys), at = _unpack(data, 4, "<IQQ")
        if version not in (2, 3):
            raise ValueError(f"format version {version}; versions 2 and 3 in little-endian order can be read")
        if num_tensors > _MAX_TENSORS:
            raise ValueError(f"it announces {num_tensors} tensors")
        at = _skip_keys(data, at, num_keys)
        for _ in range(num_tensors):
            at = _check_tensor(data, at, quant_sizes)


def _skip_keys(data: mmap.mmap, at: int, num_keys: int) -> int:
    """Return the position behind the key-value section that starts at `at`."""
    num_values = 0
    for _ in range(num_keys):
        at = _skip_string(data, at)
        (kind,), at = _unpack(data, at, "<I")
        length = 1
        if kind == _ARRAY:
            (kind, length), at = _unpack(data, at, "<IQ")
        num_values += length
        if num_values > _MAX_VALUES:
            raise ValueError(f"its metadata announces {num_values} values")
        if kind == _STRING:
            for _ in range(length):
                at = _skip_string(data, at)
        elif kind in _WIDTHS:
            at = _skip(data, at, _WIDTHS[kind] * length)
        else:
            raise ValueError(f"its metadata holds a value of unknown type {kind}")
    return at


def _check_tensor(data: mmap.mmap, at: int, quant_sizes: Mapping[Any, tuple[int, int]]) -> int:
    """Check the entry of the tensor table that starts at `at` and return the position behind it."""
    end = _skip_string(data, at)
    name = data[at + 8 : min(end, at + 80)].decode("utf-8", "replace")
    (num_dims,), at = _unpack(data, end, "<I")
    if num_dims > _MAX_DIMS:
        raise ValueError(f"tensor {name} announces {num_dims} dimensions")
    (*dims, kind, offset), at = _unpack(data, at, f"<{num_dims}QIQ")
    if kind not in quant_sizes:
        raise ValueError(f"tensor {name} has quantisation type {kind}, which the gguf package does not know")
    block, block_bytes = quant_sizes[kind]
    # The data starts at the end of this table, rounded up; that last bit is left to the reader.
    if at + offset + math.prod(dims) // block * block_bytes > len(data):
        raise ValueError(f"tensor {name} lies beyond the end of the file, so the file is incomplete")
    return at


def _unpack(data: mmap.mmap, at: int, layout: str) -> tuple[tuple[Any, ...], int]:
    """Return the values at `at` and the position behind them."""
    end = _skip(data, at, struct.calcsize(layout))
    return struct.unpack_from(layout, data, at), end


def _skip_string(data: mmap.mmap, at: int) -> int:
    (length,), at = _unpack(data, at, "<Q")
    return _skip(data, at, length)


def _skip(data: mmap.mmap, at: int, size: int) -> int:
    if at + size > len(data):
        raise ValueError(f"it ends at byte {len(data)}, inside of its header, so the file is incomplete")
    return at + size
