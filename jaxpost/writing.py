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


def check_output_file(path: str | None) -> None:
    """Raise ConfigError for a file to be written where there is a folder, before what is written is made."""
    if path is not None and Path(path).is_dir():
        raise ConfigError(f"--output_file {path} is a folder; name a file in it")


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


class Progress:
    """Lines that take long to make: kept beside the file as they come, and the file itself once all are there.

    Another run with the same key goes on after the last line that was kept.

    Args:
        path: of the file.
        key: of all that the lines depend on.
        together: so many lines are kept or made anew together.

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, path: Path, key: str, together: int = 1):
        self._path, self._kept = path, path.with_name(f".{path.name}.{key}.kept")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = self._kept.read_text(encoding="utf-8") if self._kept.exists() else ""
            lines = text.split("\n")[:-1]  # the last one may have been cut
            self._lines = lines[: len(lines) - len(lines) % together]
            self._file = self._kept.open("w", encoding="utf-8", newline="\n")
            self._file.writelines(f"{line}\n" for line in self._lines)
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another") from error

    def __len__(self) -> int:
        return len(self._lines)

    def __enter__(self) -> "Progress":
        return self

    def add(self, line: str) -> None:
        """Keep another line, which has no line breaks."""
        self._lines.append(line)
        self._file.write(f"{line}\n")
        self._file.flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None:
            replace_file(self._path, "".join(f"{line}\n" for line in self._lines))
            self._kept.unlink()
