"""What a run writes while it runs: metrics.jsonl, TensorBoard or a tracker, and a progress bar or plain lines."""

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.options import Group, check_choices, option
from jaxpost.train.history import History
from jaxpost.train.screen import Bar, Lines

METRICS_FILE = "metrics.jsonl"
REPORTERS = ("tensorboard", "wandb", "trackio", "none")
_NOT_JSON = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}  # float() reads them back


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported, where and how often; fields named as in transformers' TrainingArguments.

    Raises:
        ConfigError: a value is out of its range, or the package of a `report_to` is not installed.
    """

    help_group = Group.LOGGING

    output_dir: str | None = option(None, "Folder for everything that the run writes.", may_change=True)
    logging_steps: int = option(10, "Log every so many steps.", may_change=True)
    logging_first_step: bool = option(False, "Also log step 1.", may_change=True)
    report_to: list[str] = option(
        ["tensorboard"],
        "Copies of metrics.jsonl: tensorboard, wandb, trackio; or none.",
        choices=REPORTERS,
        may_change=True,
    )
    disable_tqdm: bool = option(False, "Plain log lines instead of the progress bar.", may_change=True)
    run_name: str | None = option(
        None, "The run's name in the trackers and in front of the progress bar.", may_change=True
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.logging_steps < 1 or self.logging_steps != int(self.logging_steps):
            raise ConfigError(f"logging_steps is {self.logging_steps}; it takes a whole number from 1")
        for name in self.reporters():
            if name != "tensorboard" and importlib.util.find_spec(name) is None:
                raise ConfigError(f"report_to {name} needs a package: pip install 'jaxpost[{name}]'")

    def reporters(self) -> list[str]:
        """`report_to` without "none"; a bare string is a list of one."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        if "none" in names and len(names) > 1:
            raise ConfigError(f"report_to is {' '.join(names)}; none stands alone")
        return [name for name in names if name != "none"]


class RunLog:
    """The run's record. Only the main process writes or speaks; elsewhere every call does nothing.

    Args:
        output_dir: gets metrics.jsonl, history.jsonl and, for TensorBoard, runs/.
        config: what to report.
        total_steps: number of updates in the whole run.
        start_step: the step to resume from; later rows of metrics.jsonl are dropped, as they will be made again.
        is_main: whether this process is the one that writes.
        console: where the bar goes; standard output by default.

    Raises:
        ConfigError: output_dir cannot be written.
    """

    def __init__(
        self,
        output_dir: Path,
        config: LoggingConfig,
        *,
        total_steps: int,
        start_step: int = 0,
        is_main: bool = True,
        console: Console | None = None,
    ):
        self._sinks: list[_JsonLines | _TensorBoard | _Tracker | Bar | Lines] = []
        self._screen: Bar | Lines | None = None
        self._history: History | None = None
        if not is_main:
            return
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            for reporter in config.reporters():
                if reporter == "tensorboard":
                    self._sinks.append(_TensorBoard(output_dir / "runs", start_step))
                else:
                    self._sinks.append(_Tracker(reporter, config.run_name or output_dir.resolve().name, start_step))
            self._sinks.insert(0, _JsonLines(output_dir / METRICS_FILE, start_step))
            self._history = History(output_dir, start_step, total_steps, type(config).__name__)
        except OSError as error:
            raise ConfigError(f"output_dir {output_dir} cannot be written ({error.strerror}); choose another") from None
        # FORCE_COLOR and its kin must not put a bar into a file.
        console = console or Console(force_terminal=None if sys.stdout.isatty() else False)
        drawable = console.is_terminal and console.is_interactive and not config.disable_tqdm
        self._screen = Bar(console, config.run_name, total_steps, start_step) if drawable else Lines(total_steps)
        self._sinks.append(self._screen)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics after update number `step`, in the order given; an evaluation's names begin with `eval_`.

        Raises:
            CheckpointError: the disk refuses the row.
        """
        assert "step" not in metrics
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        for sink in self._sinks:
            sink.log(int(step), numbers)

    def progress(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        """Move the bar to `step`; cheap enough for every step, as the screen is drawn twice a second at most."""
        if self._history is not None:
            self._history.progress(int(step))
        if self._screen is not None:
            self._screen.progress(int(step), loss, tokens_per_second)

    def sample(self, prompt: Any, completion: Any, rewards: Mapping[str, float]) -> None:
        """Let the user see a completion, with its reward by each function; a terminal shows one now and then."""
        if self._screen is not None:
            self._screen.sample(prompt, completion, rewards)

    def message(self, text: str) -> None:
        """Tell the user something, without breaking the bar."""
        if self._screen is not None:
            self._screen.message(text)

    def close(self) -> None:
        """Write out what is pending and leave the terminal in order; a second call does nothing."""
        self._screen = None
        while self._sinks:
            self._sinks.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._history is not None:
            self._history.end(error)
        self.close()


class _JsonLines:
    """One JSON object a row, written out at once."""

    def __init__(self, path: Path, start_step: int):
        self._path = path
        if path.exists():
            kept = [line + "\n" for line, row in complete_rows(path) if start_step and row["step"] <= start_step]
            temporary = path.with_name(path.name + ".tmp")
            with temporary.open("w") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        row = {"step": step} | {name: _NOT_JSON.get(str(value), value) for name, value in metrics.items()}
        data = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            while data:  # a full disk takes a part first, and refuses the rest
                data = data[self._file.write(data) :]
        except OSError as error:
            raise CheckpointError(f"{self._path}: {error.strerror}; make room there and resume the run") from None

    def close(self) -> None:
        self._file.close()


def complete_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of metrics.jsonl as its line and its content, less what a crash has torn; none if there is no file."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield line, row


class _TensorBoard:
    """Event files for TensorBoard; a resumed run hides the points that it does again."""

    def __init__(self, folder: Path, start_step: int):
        from tensorboardX import SummaryWriter
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        self._summary = Summary
        first = start_step + 1 if start_step else 0
        # The suffix keeps a run resumed within a second from writing over its first file.
        self._writer = SummaryWriter(str(folder), purge_step=first, flush_secs=10, filename_suffix=f".from{first}")
        self._file: Any = self._writer.file_writer

    def log(self, step: int, metrics: dict[str, float]) -> None:
        # One event for the row: add_scalar takes 50 microseconds for every metric.
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in _tagged(metrics).items()]
        self._file.add_summary(self._summary(value=values), step)

    def close(self) -> None:
        with suppress(OSError):  # a full disk has been reported by metrics.jsonl
            self._writer.close()


class _Tracker:
    """wandb, or trackio, which has wandb's interface."""

    def __init__(self, package: str, run_name: str, start_step: int):
        self._tracker = importlib.import_module(package)
        project = os.environ.get(f"{package.upper()}_PROJECT", "jaxpost")
        resume = {"resume": "allow"} if start_step else {}
        try:
            self._tracker.init(project=project, name=run_name, **resume)
        except Exception as error:  # not logged in, no network: each tracker has its own errors
            raise ConfigError(f"report_to {package} cannot start: {' '.join(str(error).split())}") from None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._tracker.log(_tagged(metrics), step=step)

    def close(self) -> None:
        self._tracker.finish()


def _tagged(metrics: dict[str, float]) -> dict[str, float]:
    """Names as transformers gives them to trackers: train/loss, eval/loss."""
    return {f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}": metrics[name] for name in metrics}
