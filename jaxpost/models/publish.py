"""A model folder that appears as a whole or not at all."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxpost.errors import CheckpointError, one_line
from jaxpost.locks import locked

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MARKS = (CONFIG, ADAPTER_CONFIG)  # by which a folder is taken for a model or an adapter


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder to write in, whose files become those of `target` at the end, or are gone if anything fails.

    A `target` that holds files keeps them, but for those that have new ones' names and for weights of the old model.
    While they are exchanged it has none of MARKS, so that nothing takes it for a model.

    Raises:
        CheckpointError: a file cannot be written or moved.
    """
    try:
        with _staging(target) as staging:
            yield staging
            for path in [*staging.rglob("*"), staging]:
                _to_disk(path)
            if target.is_dir() and (any(target.iterdir()) or target.samefile(os.curdir)):
                with locked(target):
                    _move_in(staging, target)
            else:
                os.rename(staging, target)
            _to_disk(target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: the model cannot be written ({one_line(error)}); make room or give another folder"
        ) from error


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, on the same file system; those of killed processes are removed.

    Where there are no locks, names are unique all the same: it takes two exports to the same folder at the same moment
    to mix them.
    """
    inside = target.is_dir() and (target.is_mount() or not os.access(target.parent, os.W_OK))
    home, prefix = target if inside else target.parent, f".{target.name}.saving-"
    home.mkdir(parents=True, exist_ok=True)
    for left in [path for path in home.iterdir() if path.name.startswith(prefix)]:
        with locked(left, wait=False) as abandoned:
            if abandoned:
                shutil.rmtree(left, ignore_errors=True)
    staging = home / f"{prefix}{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        with locked(staging):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_in(staging: Path, target: Path) -> None:
    """Exchange the model or adapter that `target` may hold; its mark is the first file to go and the last to come."""
    new = {path.name for path in staging.iterdir()}
    for mark in MARKS:
        (target / mark).unlink(missing_ok=True)
    _to_disk(target)
    template = ["chat_template.jinja"] if "tokenizer_config.json" in new else []
    for name in [*_weights(target), *template]:
        if name not in new:
            (target / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name in MARKS):
        if (staging / name).is_dir():
            shutil.rmtree(target / name, ignore_errors=True)
        os.replace(staging / name, target / name)


def _weights(folder: Path) -> list[str]:
    """Names of the weights in a folder: what a model's index lists, the single files, and the index last."""
    try:
        listed = json.loads((folder / INDEX).read_bytes())["weight_map"].values()
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):  # none, or not ours
        listed = ()
    inside = {name for name in listed if isinstance(name, str) and name == os.path.basename(name)}
    return [*sorted(name for name in inside if name.endswith(".safetensors")), WEIGHTS, ADAPTER_WEIGHTS, INDEX]


def _to_disk(path: Path) -> None:
    """Block until a file's contents, or a folder's names, would survive the loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
