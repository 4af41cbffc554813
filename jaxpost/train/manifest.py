"""The manifest of a checkpoint: what it holds, written when all of that is on disk."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import jax
from etils import epath
from jax.sharding import Sharding

from jaxpost.errors import CheckpointError, one_line
from jaxpost.sharding import path_of

MANIFEST = "manifest.json"
DIGEST = "digest:"  # what a digest in an identity begins with
SMALL = 1_000_000
REWRITTEN = "_CHECKPOINT_METADATA"  # by Orbax, when it gives the folder its name
LIBRARIES = ("jaxpost", "jax", "flax", "optax", "orbax-checkpoint")


class DamagedError(CheckpointError):
    """What is on disk is not what was saved."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: of the state.
        arrays: path -> dtype and shape, as `float32[2, 3]`.
        checksums: path -> `checksum.checksums` of it.
        files: name in the folder -> bytes, and the CRC-32 of files of up to SMALL bytes, which describe the others.
        facts: small JSON values that go with the state.
        identity: what the run must have in common with one that continues it.
        metrics: of the evaluation at that step.
        versions: of the libraries that wrote it.
    """

    step: int
    arrays: dict[str, str]
    checksums: dict[str, int]
    files: dict[str, list[int]]
    facts: dict[str, Any]
    identity: dict[str, Any]
    metrics: dict[str, float]
    versions: dict[str, str]

    def write(self, folder: epath.Path) -> None:
        """Put it into the folder of a step, as a whole or not at all."""
        body = json.dumps(asdict(dataclasses.replace(self, files=self.files or _files(folder))), sort_keys=True)
        partial = folder / f"{MANIFEST}.tmp"
        partial.write_text(json.dumps({"crc32": zlib.crc32(body.encode()), "body": body}))
        partial.replace(folder / MANIFEST)

    @classmethod
    def read(cls, folder: epath.Path) -> "Manifest":
        """That of the folder of a step.

        Raises:
            DamagedError: it is not what was written.
        """
        try:
            written = json.loads((folder / MANIFEST).read_bytes())
            body = written["body"]
            if zlib.crc32(body.encode()) != written["crc32"]:
                raise ValueError("its checksum differs")
            manifest = cls(**json.loads(body))
            for name, facts in manifest.files.items():
                if _file(folder / name) != facts:
                    raise ValueError(f"{name} is not what was written")
            return manifest
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{folder} is damaged: {one_line(error)}") from error


def _files(folder: epath.Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in folder.iterdir():
        if path.is_dir():
            found |= {f"{path.name}/{name}": facts for name, facts in _files(path).items()}
        elif path.name != REWRITTEN and not path.name.startswith(MANIFEST):
            found[path.name] = _file(path)
    return found


def _file(path: epath.Path) -> list[int]:
    size = path.stat().length
    return [size, zlib.crc32(path.read_bytes())] if size <= SMALL else [size]


def versions() -> dict[str, str]:
    """Of the libraries that have a part in a checkpoint."""
    return {name: version(name) for name in LIBRARIES}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two runs do not have in common, a few words each; digests are not shown."""
    changes = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        is_digest = isinstance(new, str) and new.startswith(DIGEST)
        changes.append(f"{name} differ" if is_digest else f"{name} was {old}, is {new}")
    return changes


def arrays_of(tree: dict[str, Any]) -> dict[str, str]:
    """Path -> dtype and shape of everything that is saved."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def kept_shapes(arrays: Mapping[str, str], layout: Sharding) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of the batches among the arrays, as `arrays_of` names them."""
    batches: dict[int, dict[str, jax.ShapeDtypeStruct]] = {}
    for path, array in arrays.items():
        if path.startswith("kept."):
            _, number, name = path.split(".")
            dtype, _, shape = array.partition("[")
            batches.setdefault(int(number), {})[name] = jax.ShapeDtypeStruct(
                tuple(json.loads(f"[{shape}")), dtype, sharding=layout
            )
    return [batches[number] for number in sorted(batches)]


def num_bytes(tree: Any) -> int:
    """Of all arrays together."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
