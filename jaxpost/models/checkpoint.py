"""Where a model's files are, and a Hugging Face folder seen as named tensors.

Weights are read as views into memory-mapped files, so a slice costs only its own bytes. Only safetensors and GGUF are
ever opened: a pickle can run code. A folder may come from anyone: its files are checked before they are believed.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxpost.errors import ConfigError, one_line
from jaxpost.models.safetensors_file import MAX_JSON_BYTES, map_safetensors, parse_object

TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
FILES = ["*.safetensors", *TOKENIZER_FILES]
PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"]


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
    path = Path(os.path.expanduser(name_or_path))
    if path.suffix == ".gguf":
        from jaxpost.models.gguf import GGUFCheckpoint

        if not os.path.isfile(path):
            raise ConfigError(f"model file {path} does not exist")
        return GGUFCheckpoint(path)
    if os.path.isfile(path):
        raise ConfigError(
            f"model {path} is a file; give the folder that holds config.json and *.safetensors, or a .gguf"
        )
    folder = FolderCheckpoint(path if os.path.isdir(path) else download(str(name_or_path), revision))
    if "text_config" not in folder.config:
        return folder
    from jaxpost.models.text_part import TextPart

    return TextPart(folder, str(name_or_path))


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


def folder_file(folder: Path, name: str) -> Path | None:
    """The file of this name in a model folder, or None where there is none.

    A link must lead to a file of the same folder, so that nobody's folder takes in the user's other files. In the
    hub's cache it may lead to a blob of the same repository or to one that the cache's repositories share.

    Raises:
        ConfigError: a folder, a pipe or a device has this name, or a link that leads elsewhere or nowhere.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: not a readable file, but a folder, a device or a link to nothing")
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    allowed = [home]
    if home.parent.name == "snapshots":
        repository = home.parent.parent
        allowed += [repository / "blobs", repository.parent / "blobs"]
    if not any(target.is_relative_to(place) for place in allowed):
        raise ConfigError(f"{path}: a link to {target}, outside of the model's folder; put the file itself there")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Parse a file that holds one JSON object; NaN and Infinity are floats.

    Raises:
        ConfigError: unreadable, too large, not JSON, not an object, or with a key twice.
    """
    try:
        size = os.path.getsize(path)
        if size > MAX_JSON_BYTES:
            raise ValueError(f"it has {size} bytes; at most {MAX_JSON_BYTES} are read")
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable JSON ({one_line(error)})") from error


class FolderCheckpoint:
    """A Hugging Face model folder: config.json, safetensors (one file or an index), tokenizer.

    Raises:
        ConfigError: a file is missing, damaged, of a kind that is never opened, or contradicts another one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        config, generation = folder_file(folder, "config.json"), folder_file(folder, "generation_config.json")
        if config is None:
            raise ConfigError(f"{folder}: no config.json; a model folder holds config.json and *.safetensors")
        self.config = read_json(config)
        self.generation_config = {} if generation is None else read_json(generation)
        self._tensors = _map_weights(folder)

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)


def _map_weights(folder: Path) -> dict[str, np.ndarray]:
    """Views into the folder's safetensors files, by name."""
    index = folder_file(folder, "model.safetensors.index.json")
    if index is not None:
        return _map_shards(index)
    single = folder_file(folder, "model.safetensors")
    if single is not None:
        return map_safetensors(single)
    pickles = sorted(path for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ConfigError(
            f"{pickles[0]}: pickled weights can run code and are never opened; "
            "convert them with transformers' save_pretrained (safetensors)"
        )
    raise ConfigError(f"{folder}: no model.safetensors and no model.safetensors.index.json; download the model again")


def _map_shards(index: Path) -> dict[str, np.ndarray]:
    """Views into the files that an index lists, each of which must hold exactly what is listed for it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ConfigError(f"{index}: weight_map must map tensor names to file names")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(file, set()).add(name)
    tensors: dict[str, np.ndarray] = {}
    for file, names in sorted(listed.items()):
        plain = file == Path(file).name and file.endswith(".safetensors")
        path = folder_file(index.parent, file) if plain else None
        if path is None:
            raise ConfigError(f"{index}: {file[:80]!r} is not a file of this folder that ends in .safetensors")
        held = map_safetensors(path)
        if names - held.keys():
            raise ConfigError(f"{index}: {file} should hold {_few(names - held.keys())}, which it does not")
        if held.keys() - names:
            raise ConfigError(f"{path}: holds {_few(held.keys() - names)}, which {index.name} does not list there")
        tensors |= held
    return tensors


def _few(names: Iterable[str]) -> str:
    """The first of these names, in one short line."""
    first, *others = sorted(names)
    return f"tensor {first[:80]!r}{f' and {len(others)} more' if others else ''}"


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer of a local folder, never running the folder's own code.

    Raises:
        ConfigError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    for pattern in [*TOKENIZER_FILES, "additional_chat_templates/*.jinja"]:
        for path in folder.glob(pattern):
            folder_file(folder, os.fspath(path.relative_to(folder)))
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True, trust_remote_code=False)
        tokenizer("")  # some damage shows only here, such as a maximal length that is a text
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises whatever its parsers raise; a panic in Rust is no Exception
        raise ConfigError(
            f"{folder}: the tokenizer cannot be read with transformers' own code ({one_line(error)})"
        ) from error
    return tokenizer
