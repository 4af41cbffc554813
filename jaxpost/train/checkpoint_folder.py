"""The folder of a run's checkpoints: which are there, and what becomes of them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from etils import epath

from jaxpost.errors import CheckpointError, ConfigError, one_line
from jaxpost.processes import is_main
from jaxpost.train.manifest import MANIFEST


class CheckpointFolder:
    """One folder a step; a step whose folder has no manifest does not count.

    Args:
        path: a folder, or gs://BUCKET/PATH, by gcsfs.

    Raises:
        ConfigError: the storage cannot be reached.
    """

    def __init__(self, path: Path | str):
        self.is_local = "://" not in str(path)
        try:
            self.path = epath.Path(os.path.abspath(path) if self.is_local else path)
            self.path.exists()
        except ImportError as error:
            raise ConfigError(f"checkpoint_dir {path} needs a package: pip install 'jaxpost[gcs]'") from error
        except Exception as error:  # of the storage: no such bucket, no right to it, no network
            raise ConfigError(f"checkpoint_dir {path} cannot be reached: {one_line(error)}") from error
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"checkpoint_dir {path} is a file; give a folder")

    def __str__(self) -> str:
        return str(self.path)

    def steps(self) -> list[int]:
        """The complete checkpoints, the oldest first."""
        found = (path for path in self._entries() if path.name.isdigit() and self.is_complete(int(path.name)))
        return sorted(int(path.name) for path in found)

    def damaged(self) -> list[str]:
        """Names of what was set aside because it was damaged."""
        return sorted(path.name for path in self._entries() if ".corrupt" in path.name)

    def place(self, step: int) -> epath.Path:
        """Where the checkpoint of a step is."""
        return self.path / str(step)

    def is_complete(self, step: int) -> bool:
        """Whether it is there."""
        return (self.place(step) / MANIFEST).exists()

    def set_aside(self, step: int, why: str) -> None:
        """Keep a checkpoint that does not count any more under another name."""
        names = (f"{step}.{why}{'' if n == 1 else n}" for n in range(1, 1000))
        if is_main():
            self.place(step).rename(next(self.path / name for name in names if not (self.path / name).exists()))

    def delete(self, step: int) -> None:
        """Delete a checkpoint; an interruption leaves none that counts."""
        if is_main():
            (self.place(step) / MANIFEST).unlink()
            self.place(step).rmtree()

    def clean(self, tell: Callable[[str], None]) -> None:
        """Delete what an interrupted save has left; a folder without a manifest is written over when its turn comes."""
        for path in self._entries() if is_main() else ():
            if ".orbax-checkpoint-tmp" in path.name:
                path.rmtree()
            elif path.name.isdigit() and not (path / MANIFEST).exists():
                tell(f"{path} has no {MANIFEST}: it was not finished, and does not count")

    def check_room(self, needed: int) -> float:
        """How many checkpoints of so many bytes the disk has room for.

        Raises:
            CheckpointError: not even one.
        """
        if not self.is_local:
            return float("inf")
        place = next(path for path in (self.path, *self.path.parents) if path.exists())
        free = shutil.disk_usage(place).free
        if free < needed:
            raise CheckpointError(
                f"a checkpoint takes {needed / 1e9:.3g} GB, {place} has {free / 1e9:.3g} GB free; make room there or "
                "give another --output_dir"
            )
        return free / max(needed, 1)

    def _entries(self) -> list[epath.Path]:
        return list(self.path.iterdir()) if self.path.is_dir() else []
