"""When a run was at work: history.jsonl, a line where it begins or goes on and one where it ends."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jaxpost.errors import one_line

HISTORY_FILE = "history.jsonl"
DONE = "done"


class Session(NamedTuple):
    """A time at work.

    Attributes:
        began: seconds since 1970.
        start: the step that it went on from, 0 for a fresh run.
        total: steps of the whole run.
        config: name of the config's class.
        ended: seconds since 1970; None where it did not come to say so.
        step: the last one that was done.
        why: it ended: `done`, or what went wrong.
    """

    began: float
    start: int
    total: int
    config: str = ""
    ended: float | None = None
    step: int | None = None
    why: str = ""


class History:
    """Keeps it.

    Args:
        folder: of the run.
        start: the step to go on from; a fresh run forgets those before it.
        total: steps of the whole run.
        config: name of the config's class.
    """

    def __init__(self, folder: Path, start: int, total: int, config: str):
        self._path, self._step = folder / HISTORY_FILE, start
        self._is_over = 0 < total <= start  # a finished run that is asked for once more
        if not start:
            self._path.unlink(missing_ok=True)
        self._add({"began": time.time(), "start": start, "total": total, "config": config})

    def progress(self, step: int) -> None:
        """Note that a step is done."""
        self._step = max(self._step, step)

    def end(self, error: BaseException | None) -> None:
        """Note why it ends; a second call does nothing."""
        why = DONE if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)
        with suppress(OSError):  # a full disk has been reported by metrics.jsonl
            self._add({"ended": time.time(), "step": self._step, "why": why})
        self._is_over = True

    def _add(self, line: dict[str, Any]) -> None:
        if not self._is_over:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def sessions(folder: Path) -> list[Session]:
    """Of the run in a folder, in order; none where it has not been kept, and none of torn lines."""
    found: list[Session] = []
    for line in _lines(folder / HISTORY_FILE):
        with suppress(ValueError, KeyError, TypeError):
            if "began" in line:
                found.append(Session(float(line["began"]), int(line["start"]), int(line["total"]), str(line["config"])))
            elif found and found[-1].ended is None:
                found[-1] = found[-1]._replace(ended=float(line["ended"]), step=int(line["step"]), why=str(line["why"]))
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            if isinstance(line := json.loads(text), dict):
                yield line
