"""Opening a GGUF file: its metadata, its tensors, and every check that keeps a damaged file from doing harm.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md). The `gguf` package undoes the quantisation.
Its GGUFReader is not used: version 0.19 loops without end on a damaged array length
(https://github.com/ggml-org/llama.cpp/pull/27188) and takes ten times as long on a sound file.
"""

import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxpost.errors import ConfigError, one_line

HF_FOLDER = "pass the model's original Hugging Face folder instead"
CONVERT = "convert the model again with a current llama.cpp"

_NEEDED = object()
# The type codes of metadata values, with their numpy types.
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
# Bounds on the work. The largest vocabularies have 0.8 million tokens and merges, the deepest models 2,000 tensors.
_MAX_STRINGS, _MAX_TENSORS, _MAX_DIMS = 1 << 21, 1 << 16, 4


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the file; `shape` is as numpy counts it, [out, in] for a matrix, and `data` its mapped bytes."""

    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    data: np.ndarray


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
        found = self.get(key, list if kind is str else np.ndarray, default)
        if found is default:
            return default
        values = found if kind is str else found.tolist()
        if values and type(values[0]) is not kind:
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


def open_gguf(path: str | os.PathLike) -> tuple[Metadata, dict[str, Tensor]]:
    """Return the file's metadata and its tensors by GGUF name; no tensor is read yet.

    Raises:
        ConfigError: `gguf` is not installed, the file is not a whole, readable GGUF file, or the `gguf` package cannot
            dequantise a tensor.
    """
    path = os.fspath(path)
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        remedy = "run: pip install 'jaxpost[gguf]'"
        raise ConfigError(f"{path}: a GGUF file needs the gguf package; {remedy}") from error
    try:
        with open(path, "rb") as file:
            header = _Header(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        values, tensors = header.parse()
    except (OSError, ValueError) as error:
        reason = f"not a readable GGUF file ({one_line(error)})"
        raise ConfigError(f"{path}: {reason}; download or convert it again") from error
    metadata = Metadata(path, values)
    if metadata.get("split.count", int, 1) > 1:
        raise metadata.error("the file is one part of several; join them first with llama-gguf-split --merge")
    _check_quantisation(metadata, tensors.values())
    return metadata, tensors


def dequantize(tensor: Tensor) -> np.ndarray:
    """Return the tensor's values as float32, perhaps still mapped from the file."""
    from gguf import quants

    with np.errstate(all="ignore"):  # an infinite scale in the file is not an error of the arithmetic
        return quants.dequantize(tensor.data, tensor.kind)


def _check_quantisation(metadata: Metadata, tensors: Iterable[Tensor]) -> None:
    """Raise ConfigError if the `gguf` package cannot dequantise a tensor, tried on one empty block of each type."""
    from gguf import GGML_QUANT_SIZES, quants

    for kind, name in {tensor.kind: tensor.name for tensor in tensors}.items():
        try:
            quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            reason = f"tensor {name[:80]} has quantisation type {kind.name}, which the gguf package cannot dequantise"
            raise metadata.error(f"{reason}; convert the model to F16 or Q8_0") from error


class _Header:
    """A cursor over a mapped file's header, which checks every length against the end of the file.

    Raises (every method):
        ValueError: what is damaged.
    """

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 0
        self.num_strings = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the metadata and the tensors by name."""
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not start with the letters GGUF")
        self.take(4)
        version, num_tensors, num_keys = self.unpack("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"format version {version}; versions 2 and 3 in little-endian order can be read")
        if num_tensors > _MAX_TENSORS:
            raise ValueError(f"it announces {num_tensors} tensors")
        values = {}
        for _ in range(num_keys):
            key = self.string()
            if key in values:
                raise ValueError(f"its metadata holds {key[:80]} twice")
            values[key] = self.value()
        return values, self.tensors(num_tensors, values.get("general.alignment", 32))

    def tensors(self, count: int, alignment: Any) -> dict[str, Tensor]:
        """Return the tensors by name; the cursor stands before the first one's entry."""
        entries = [self.tensor_entry() for _ in range(count)]
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError("its general.alignment is not a power of two")
        start = -(-self.at // alignment) * alignment
        tensors = {name: self.tensor(name, shape, kind, start + offset) for name, shape, kind, offset in entries}
        if len(tensors) != count:
            raise ValueError("two of its tensors have the same name")
        end = 0
        for offset, name in sorted((offset, name) for name, _, _, offset in entries):
            if offset < end:  # else a small file could announce a model of any size
                raise ValueError(f"tensor {name[:80]} overlaps another")
            end = offset + tensors[name].data.nbytes
        return tensors

    def take(self, size: int) -> int:
        """Return the position and move `size` bytes on."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, inside of its header, so the file is incomplete")
        return begin

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Return the values of a `struct` layout."""
        return struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        """Return a length-prefixed string."""
        (length,) = self.unpack("<Q")
        begin = self.take(length)
        self.num_strings += 1
        if self.num_strings > _MAX_STRINGS:
            raise ValueError(f"its header holds over {_MAX_STRINGS} strings")
        return self.data[begin : self.at].decode("utf-8")

    def value(self) -> Any:
        """Return a metadata value: a Python scalar, a list of strings or a numpy array of numbers."""
        (kind,), length = self.unpack("<I"), None
        if kind == _ARRAY:
            kind, length = self.unpack("<IQ")
        if kind == _STRING:
            return self.string() if length is None else [self.string() for _ in range(length)]
        if kind not in _NUMBERS:
            raise ValueError(f"its metadata holds a value of unknown type {kind}")
        dtype, count = np.dtype(_NUMBERS[kind]), 1 if length is None else length
        begin = self.take(dtype.itemsize * count)
        numbers = np.frombuffer(self.data, dtype, count, begin) if count else np.empty(0, dtype)
        return numbers[0].item() if length is None else numbers

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return a tensor's name, shape, type and offset; the file counts the fastest dimension first."""
        name = self.string()
        (num_dims,) = self.unpack("<I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ValueError(f"tensor {name[:80]} announces {num_dims} dimensions")
        *dims, kind, offset = self.unpack(f"<{num_dims}QIQ")
        if not all(dims):
            raise ValueError(f"tensor {name[:80]} announces a dimension of 0")
        return name, tuple(reversed(dims)), kind, offset

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> Tensor:
        """Return the tensor whose bytes begin at `begin`."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

        if kind not in GGML_QUANT_SIZES:
            raise ValueError(f"tensor {name[:80]} has quantisation type {kind}, which the gguf package does not know")
        kind = GGMLQuantizationType(kind)
        byte_shape = quants.quant_shape_to_byte_shape(shape, kind)
        size = math.prod(byte_shape)
        if begin + size > len(self.data):
            raise ValueError(f"tensor {name[:80]} lies beyond the end of the file, so the file is incomplete")
        data = np.frombuffer(self.data, np.uint8)[begin : begin + size].reshape(byte_shape)
        return Tensor(name, shape, kind, data)
