"""Files that appear as a whole or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path

from jaxpost.errors import ConfigError


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader finds the old file or the whole new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_lines(path: str | None, lines: Iterable[str]) -> None:
    """Write lines to a file, whose folder is made where it is missing; None for the terminal.

    Raises:
        ConfigError: it cannot be written.
    """
    text = "".join(f"{line}\n" for line in lines)
    if path is None:
        print(text, end="")
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(path), text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another") from error
