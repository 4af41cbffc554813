"""What a run shows while it runs: on a terminal the latest metrics and a bar, elsewhere plain lines."""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.control import strip_control_codes
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from jaxpost.train.panels import PANELS, matching, time_shares

RECENT = 10  # log lines that a mean and a trend are of
SAMPLE_SECONDS = 5.0  # that a completion can be read for
_BLOCK = 78  # columns of the terminal that a metric takes
_BARS = "▁▂▃▄▅▆▇█"
_RATES = ("tokens_per_second", "mfu")  # said below the table


class Bar:
    """The latest metrics, where the time goes and a completion now and then, above a progress bar."""

    def __init__(self, console: Console, name: str | None, total_steps: int, start_step: int):
        self._console = console
        fixed, wide = Column(no_wrap=True), console.width >= 100
        self._unit = "tokens/s" if wide else "tok/s"
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, style="bold"),
            BarColumn(bar_width=None, table_column=Column(min_width=6)),
            TextColumn("{task.completed}/{task.total}", style="green", table_column=fixed),
            TextColumn("{task.fields[loss]}", table_column=fixed),
            TextColumn("{task.fields[speed]}", style="cyan", table_column=fixed),
            TimeElapsedColumn(table_column=fixed),
            TextColumn("elapsed" if wide else "<", style="dim", table_column=fixed),
            TimeRemainingColumn(table_column=fixed),
            TextColumn("left" if wide else "", style="dim", table_column=fixed),
            console=console,
            expand=True,
            speed_estimate_period=600,  # a step of a large model can take minutes
        )
        name = name or "train"
        self._task = self._progress.add_task(name, completed=start_step, total=total_steps, loss="", speed="")
        self._recent: dict[str, deque[float]] = {}
        self._metrics: tuple[tuple[str, tuple[float, ...]], ...] = ()  # replaced as a whole: another thread draws
        self._row: Mapping[str, float] = {}
        self._sample: tuple[Text, Text] | None = None
        self._sampled = -math.inf
        self._live = Live(
            console=console, get_renderable=self._view, refresh_per_second=2, vertical_overflow="crop", transient=False
        )
        self._live.start(refresh=True)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._recent.setdefault(name, deque(maxlen=RECENT)).append(value)
        known = [name for panel in PANELS for name in matching(panel, self._recent) if name not in _RATES]
        self._metrics = tuple((name, tuple(self._recent[name])) for name in known)
        if "step_time" in metrics:
            self._row = metrics
        if any(name.startswith("eval_") for name in metrics):
            self.message(line_of(step, metrics))

    def progress(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        fields = {}
        if loss is not None:
            fields["loss"] = f"loss {loss:#.4g}"
        if tokens_per_second is not None:
            fields["speed"] = f"{tokens_per_second:,.0f} {self._unit}"
        self._progress.update(self._task, completed=step, **fields)

    def sample(self, prompt: Any, completion: Any, rewards: Mapping[str, float]) -> None:
        if time.monotonic() - self._sampled >= SAMPLE_SECONDS:
            self._sampled = time.monotonic()
            words = "  ".join(f"{name} {value:.3g}" for name, value in rewards.items())
            said = Text(plain_text(completion))
            self._sample = (Text(plain_text(prompt), style="dim"), Text.assemble((words + "  ", "bold"), said))

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._sample = None
        self._live.stop()

    def _view(self) -> Group:
        parts: list[RenderableType] = []
        width, height = self._console.size
        if self._metrics and width >= 50 and height >= 12:
            parts += [self._table(width, height // 2 - 3), _time_line(self._row)]
            if self._sample is not None:
                prompt, completion = self._sample
                parts += [_cut(prompt, width, is_end=True), _cut(completion, 3 * width)]
        return Group(*parts, self._progress.get_renderable())

    def _table(self, width: int, most_rows: int) -> Table:
        """The metrics of most interest, in as many columns as there is room for."""
        blocks = max(1, width // _BLOCK)
        rows = min(most_rows, -(-len(self._metrics) // blocks))
        shown = self._metrics[: rows * blocks]
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", collapse_padding=True)
        longest = max(len(name) for name, _ in shown)
        name_width = min(longest, max(12, width // blocks - 37))
        for _ in range(-(-len(shown) // rows)):
            table.add_column("metric", width=name_width, no_wrap=True)
            table.add_column("last", width=9, justify="right", no_wrap=True, style="bold")
            table.add_column(f"mean of {RECENT}", width=10, justify="right", no_wrap=True)
            table.add_column("", width=RECENT, no_wrap=True, style="cyan")
        for row in range(rows):
            cells: list[RenderableType] = []
            for name, values in shown[row::rows]:
                trend = "" if self._console.options.ascii_only else _trend(values)
                cells += [Text(name), Text(number(values[-1])), Text(number(_mean(values))), Text(trend)]
            table.add_row(*cells)
        return table


def _time_line(row: Mapping[str, float]) -> Text:
    """Rates of the last log line and where its time went."""
    words = []
    if "device_tokens_per_second" in row:
        words.append(f"{row['device_tokens_per_second']:,.0f} tokens/s/device")
    if "mfu" in row:
        words.append(f"MFU {row['mfu']:.1%}")
    words += [f"{name} {share:.0%}" for name, share in time_shares(row).items()]
    return Text("  ".join(words), style="cyan")


def _cut(text: Text, most: int, *, is_end: bool = False) -> Text:
    """At most so many characters, of the beginning or the end."""
    if len(text) <= most:
        return text
    return Text.assemble("…", text[1 - most :]) if is_end else Text.assemble(text[: most - 1], "…")


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _trend(values: Sequence[float]) -> str:
    """A line of bars from the least to the greatest."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    if not high > low:
        return _BARS[3] * len(values)
    places = [(value - low) / (high - low) if math.isfinite(value) else None for value in values]
    return "".join("·" if place is None else _BARS[round(place * (len(_BARS) - 1))] for place in places)


def number(value: float) -> str:
    """Four digits that count, and no more room than nine characters."""
    if math.isfinite(value) and 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.1f}"
    return f"{value:.4g}"


def plain_text(cell: Any) -> str:
    """A prompt or completion, a text or messages, in a line."""
    if isinstance(cell, list):
        cell = " ".join(str(message["content"] if isinstance(message, dict) else message) for message in cell)
    return " ".join(strip_control_codes(str(cell)).replace("\x1b", "").split())


class Lines:
    """Plain lines, one for every log: for files, pipes and notebooks."""

    def __init__(self, total_steps: int):
        self._total_steps = total_steps
        self._start = time.monotonic()
        self._first: tuple[int, float] | None = None  # the first step seen; compilation lies before it

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.progress(step, None, None)
        assert self._first is not None
        now, (first_step, first_time) = time.monotonic(), self._first
        elapsed = timedelta(seconds=int(now - self._start))
        line = line_of(f"{step}/{self._total_steps}", metrics) + f"  elapsed {elapsed}"
        if step > first_step:
            left = (self._total_steps - step) * (now - first_time) / (step - first_step)
            line += f"  left {timedelta(seconds=int(left))}"
        self.message(line)

    def progress(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        if self._first is None:
            self._first = (step, time.monotonic())

    def sample(self, prompt: Any, completion: Any, rewards: Mapping[str, float]) -> None:
        """Nothing: lines are for numbers; `--log_completions` prints some."""

    def message(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


def line_of(step: int | str, metrics: dict[str, float]) -> str:
    """A log line as text."""
    words = [f"step {step}"]
    for name, value in metrics.items():
        whole = abs(value) < 1e15 and (abs(value) >= 1e3 or value == int(value))
        words.append(f"{name} {value:.0f}" if whole else f"{name} {value:.4g}")
    return "  ".join(words)
