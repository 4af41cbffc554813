"""What the folder of a run tells of it."""

import itertools
import math
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpost.errors import ConfigError, one_line
from jaxpost.reporting.completions import Generation, read_generations
from jaxpost.train.history import DONE, Session, sessions
from jaxpost.train.logging import METRICS_FILE, complete_rows
from jaxpost.train.panels import time_shares
from jaxpost.train.report import is_secret, series_of

LEFT_OUT = ("epoch", "step")  # they go up, whatever happens
NEVER_COMPARED = ("output_dir", "run_name")


class Series(NamedTuple):
    """A metric: its steps and values, [N]."""

    steps: np.ndarray
    values: np.ndarray


class Run(NamedTuple):
    """A run.

    Attributes:
        name: the folder's.
        folder: of the run.
        series: name -> metric, in the order of their first rows.
        epoch: that the last row tells.
        settings: what config.yaml holds, less what is nobody's business.
        sessions: when it was at work.
        is_at_work: whether it is now; None where that cannot be known.
        generations: some of its completions.
        notes: what is wrong with the folder.
    """

    name: str
    folder: Path
    series: dict[str, Series]
    epoch: float | None
    settings: dict[str, Any]
    sessions: list[Session]
    is_at_work: bool | None
    generations: list[Generation]
    notes: list[str]

    @property
    def last_step(self) -> int:
        """The last one that is known to be done."""
        steps = [int(series.steps[-1]) for series in self.series.values()]
        return max([*steps, *(session.step or session.start for session in self.sessions)], default=0)

    @property
    def resumed(self) -> list[int]:
        """The steps that it went on from."""
        return [session.start for session in self.sessions if session.start]

    def last(self, name: str) -> float | None:
        """The last value of a metric."""
        return float(self.series[name].values[-1]) if name in self.series else None

    def typical(self, name: str) -> float | None:
        """The median of a metric, without its first value, where programs are compiled."""
        if name not in self.series:
            return None
        values = self.series[name].values
        return float(np.median(values[1:] if len(values) > 1 else values))

    @property
    def shares(self) -> dict[str, float]:
        """Where the time of all steps went."""
        if "step_time" not in self.series:
            return {}
        ends = self.series["step_time"].steps
        lengths = dict(zip(ends.tolist(), np.diff(ends, prepend=0).tolist(), strict=True))  # of log lines, in steps
        spent = {
            name: float(np.nansum([lengths.get(step, 0) for step in steps.tolist()] * values))
            for name, (steps, values) in self.series.items()
            if name.endswith("_time")
        }
        return time_shares(spent)

    @property
    def seconds(self) -> tuple[float, bool] | None:
        """How long it was at work, and whether that is all; None where nothing tells."""
        if self.sessions:
            ended = [session for session in self.sessions if session.ended is not None]
            total = sum((session.ended or 0.0) - session.began for session in ended)
            last = self.sessions[-1]
            if last.ended is None:
                total += max(0.0, (self.folder / METRICS_FILE).stat().st_mtime - last.began)
            return total, len(ended) == len(self.sessions)
        if "step_time" not in self.series:
            return None
        steps, values = self.series["step_time"]
        return float(np.nansum(np.diff(steps, prepend=0) * values)), False

    @property
    def status(self) -> tuple[str, str]:
        """(done, going, stopped or unknown; a sentence)."""
        if self.sessions and self.sessions[-1].ended is not None:
            last = self.sessions[-1]
            return ("done", "Done") if last.why == DONE else ("stopped", f"Stopped at step {last.step}: {last.why}")
        if self.is_at_work:
            return "going", "Still going"
        if self.sessions and self.is_at_work is False:
            return "stopped", f"Ended without a word after step {self.last_step}: killed, or its machine went away"
        card, rows = self.folder / "README.md", self.folder / METRICS_FILE
        if not self.sessions and card.exists() and card.stat().st_mtime >= rows.stat().st_mtime:
            return "done", "Done"
        return "unknown", f"Not known; the last line is of step {self.last_step}"


def read_run(folder: Path, name: str) -> Run:
    """Read the folder of a run; what it lacks or cannot be read is noted.

    Raises:
        ConfigError: it is no folder of a run.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give the output_dir of a run")
    path = folder / METRICS_FILE
    if not path.is_file() and not (folder / "config.yaml").is_file():
        inner = sorted(each.parent.name for each in folder.glob(f"*/{METRICS_FILE}"))
        remedy = f"; it holds runs: {', '.join(inner[:5])}" if inner else "; give the output_dir of a run"
        raise ConfigError(f"{folder} is no run, as it has no {METRICS_FILE}{remedy}")
    notes: list[str] = []
    try:
        counted = itertools.count()
        rows = (row for row, _ in zip(complete_rows(path), counted, strict=False))
        series = {key: Series(*map(np.asarray, points)) for key, points in series_of(rows).items()}
        num_torn = _num_lines(path) - next(counted)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    if num_torn:
        notes.append(f"{METRICS_FILE}: {num_torn} lines are not whole and left out")
    if not series:
        notes.append(f"{METRICS_FILE} has no rows yet")
    epoch = float(series["epoch"].values[-1]) if "epoch" in series else None
    return Run(
        name=name,
        folder=folder,
        series={key: series[key] for key in series if key not in LEFT_OUT},
        epoch=epoch,
        settings=_settings(folder, notes),
        sessions=sessions(folder),
        is_at_work=_at_work(folder),
        generations=read_generations(folder, notes),
        notes=notes,
    )


def names_of(folders: Sequence[Path]) -> list[str]:
    """Of runs: their folders', with as many of the folders above as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return [str(Path(*part[-depth:])) for part in parts]


def _num_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _settings(folder: Path, notes: list[str]) -> dict[str, Any]:
    import yaml

    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        notes.append(f"config.yaml cannot be read ({one_line(error)})")
        return {}
    if not isinstance(settings, dict):
        notes.append("config.yaml holds no settings")
        return {}
    return {str(name): value for name, value in settings.items() if not is_secret(str(name))}


def _at_work(folder: Path) -> bool | None:
    """Whether the process that its lock names is alive; the lock itself is left to those who train."""
    try:
        found = re.fullmatch(r"process (\d+) on (.+)", (folder / ".lock").read_text(errors="replace").strip())
    except OSError:
        return None
    if found is None or found[2] != socket.gethostname():
        return None
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def best(series: Series, which: str) -> tuple[float, int] | None:
    """The best value, least or most, and its step; None where none is."""
    finite = np.isfinite(series.values)
    if not which or not finite.any():
        return None
    worst = math.inf if which == "least" else -math.inf
    values = np.where(finite, series.values, worst)
    place = int(values.argmin() if which == "least" else values.argmax())
    return float(values[place]), int(series.steps[place])
