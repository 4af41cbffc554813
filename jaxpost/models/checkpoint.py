"""Where a model's files are, and a Hugging Face folder seen as named tensors.

Weights are read as views into memory-mapped files, so a slice costs only its own bytes. Only safetensors and GGUF are
ever opened: a pickle can run code.
"""

import json
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from jaxpost.errors import ConfigError, one_line

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@runtime_checkable
class Checkpoint(Protocol):
    """Named tensors in HF's names and layout, with the config and the tokenizer that belong to them."""

    config: dict[str, Any]
    generation_config: dict[str, Any]

    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray: ...

    def tokenizer(self) -> Any: ...


def open_checkpoint(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Open a local HF folder, a `.gguf` file or a hub id.

    Raises:
        ConfigError: nothing there, or the files are not ones that jaxpost reads.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf":
        from jaxpost.models.gguf import GGUFCheckpoint

        if not path.is_file():
            raise ConfigError(f"model file {path} does not exist")
        return GGUFCheckpoint(path)
    return FolderCheckpoint(path if path.is_dir() else download(str(name_or_path), revision))


def download(repo_id: str, revision: str | None = None) -> Path:
    """The local snapshot of a hub repository, downloaded if it is not in the cache.

    Raises:
        ConfigError: not a hub id, no such repository, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    looks_local = repo_id.startswith((".", "/", "~")) or repo_id.count("/") > 1
    if looks_local:
        raise ConfigError(f"model {repo_id!r} is neither a local folder nor a .gguf file nor a hub id (owner/name)")
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=FILES))
    except HFValidationError as error:
        raise ConfigError(f"model {repo_id!r} does not exist here and is not a hub id: {one_line(error)}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {repo_id!r} is not a local folder and could not be fetched from the hub: {one_line(error)}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ConfigError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class FolderCheckpoint:
    """A Hugging Face model folder: config.json, safetensors (one file or an index), tokenizer."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder}: no config.json; a model folder holds config.json and *.safetensors")
        self.config = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self._tensors: dict[str, np.ndarray] = {}
        for file in self._weight_files():
            for name, tensor in map_safetensors(file).items():
                if name in self._tensors:
                    raise ConfigError(f"{file}: tensor {name} is in another file of this folder too")
                self._tensors[name] = tensor

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    def _weight_files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            single = self.folder / "model.safetensors"
            if single.is_file():
                return [single]
            pickles = [*self.folder.glob("*.bin"), *self.folder.glob("*.pt"), *self.folder.glob("*.pth")]
            if pickles:
                raise ConfigError(
                    f"{pickles[0]}: pickled weights can run code and are never opened; "
                    "convert them with transformers' save_pretrained (safetensors)"
                )
            raise ConfigError(f"{self.folder}: no model.safetensors and no model.safetensors.index.json")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ConfigError(f"{index}: weight_map must map tensor names to file names")
        files = sorted(set(weight_map.values()))
        for file in files:
            if Path(file).name != file or not (self.folder / file).is_file():
                raise ConfigError(f"{index}: {file!r} is not a file of this folder")
        return [self.folder / file for file in files]


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Views into a memory-mapped safetensors file, by name.

    Raises:
        ConfigError: not a valid safetensors file, or a dtype that jaxpost does not load.
    """
    import safetensors

    try:
        # The library's own parser checks the header, the sizes and that tensors tile the file exactly.
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a valid safetensors file ({one_line(error)})") from error
    data = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ConfigError(f"{path}: {name} is stored as {entry['dtype']}; supported: {', '.join(DTYPES)}")
        begin, end = entry["data_offsets"]
        tensors[name] = data[start + begin : start + end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer of a local folder, never running the folder's own code.

    Raises:
        ConfigError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise ConfigError(f"{folder}: the tokenizer cannot be read ({one_line(error)})") from error
    return tokenizer
