"""Curves of runs as SVG, and the numbers behind them for the page's script."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from jaxpost.reporting.runs import Run, Series
from jaxpost.train.panels import PANELS, Panel, base_name, matching
from jaxpost.train.report import SMOOTH_FROM, running_mean

NUM_COLORS = 8  # of the style sheet
BOX = {"width": 400, "height": 210, "left": 46, "right": 10, "top": 10, "bottom": 24}
MOST_POINTS, LEAST_POINTS, ALL_POINTS = 400, 60, 40_000  # of a line, and of all together
_STEPS = (1, 2, 2.5, 5, 10)


class Line(NamedTuple):
    """A metric of a run.

    Attributes:
        run: its number.
        name: of the metric.
        color: its number.
        is_dashed: it is of an evaluation.
        points: as logged, or fewer.
        mean: a running mean; None where the points are few or do not scatter.
    """

    run: int
    name: str
    color: int
    is_dashed: bool
    points: Series
    mean: Series | None


class Chart(NamedTuple):
    """A plot.

    Attributes:
        title: of it.
        label: what the y axis shows.
        is_main: it is of a kind that is worth a look at every run.
        by_run: a colour is a run; if not, a metric.
        lines: in it.
    """

    title: str
    label: str
    is_main: bool
    by_run: bool
    lines: list[Line]


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Of one run a chart for each kind of metrics, of several one for each metric, with its evaluations."""
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    groups: list[tuple[str, Panel, bool, list[str]]] = []
    for panel in PANELS:
        found = matching(panel, names)
        if len(runs) == 1:
            groups += [(panel.title, panel, True, found)] if found else []
        else:
            groups += [(base, panel, True, members) for base, members in _by_base(found).items()]
    taken = {name for *_, members in groups for name in members}
    other = Panel("", "", "")
    groups += [(base, other, False, each) for base, each in _by_base(n for n in names if n not in taken).items()]
    count = sum(name in run.series for run in runs for *_, members in groups for name in members)
    most = min(MOST_POINTS, max(LEAST_POINTS, ALL_POINTS // max(1, count)))
    return [
        Chart(title, panel.label, is_main, len(runs) > 1, _lines(runs, members, panel.noisy, most))
        for title, panel, is_main, members in groups
    ]


def _by_base(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(base_name(name), []).append(name)
    return groups


def _is_of_evaluation(name: str) -> bool:
    return name.startswith("eval_")


def _lines(runs: Sequence[Run], names: list[str], is_noisy: bool, most: int) -> list[Line]:
    lines = []
    bases = list(_by_base(names))
    names = [name for base in bases for name in sorted(names, key=_is_of_evaluation) if base_name(name) == base]
    for number, run in enumerate(runs):
        for name in names:
            if name not in run.series:
                continue
            series, is_dashed, mean = run.series[name], _is_of_evaluation(name), None
            if is_noisy and not is_dashed and len(series.values) >= SMOOTH_FROM:
                mean = Series(*running_mean(series.steps, series.values, most // 2))
            color = (number if len(runs) > 1 else bases.index(base_name(name))) % NUM_COLORS
            lines.append(Line(number, name, color, is_dashed, thinned(series, most), mean))
    return lines


def thinned(series: Series, most: int) -> Series:
    """At most so many points, among them the least and the greatest of every stretch."""
    count = len(series.values)
    if count <= most:
        return series
    kept = {0, count - 1}
    for stretch in np.array_split(np.arange(1, count - 1), (most - 2) // 2):
        values = series.values[stretch]
        finite = np.isfinite(values)
        low, high = np.where(finite, values, math.inf).argmin(), np.where(finite, values, -math.inf).argmax()
        kept |= {int(stretch[low]), int(stretch[high])}
    order = sorted(kept)
    return Series(series.steps[order], series.values[order])


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About so many round numbers between two."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(each * power for each in _STEPS if each * power >= raw * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number beside an axis."""
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit * (10 if name == "k" else 1):
            return f"{value / unit:.4g}{name}"
    if 0 < size < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def svg(chart: Chart, description: str) -> str:
    """The chart as it is before anybody touches it; the page's script draws it in the same way."""
    everything = [series for line in chart.lines for series in (line.points, line.mean) if series is not None]
    steps = np.concatenate([series.steps for series in everything])
    values = np.concatenate([series.values for series in everything]).astype(float)
    values = values[np.isfinite(values)]
    left, right = float(steps.min()), float(max(steps.max(), steps.min() + 1))
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    low, high = low - pad, high + pad
    inner_width = BOX["width"] - BOX["left"] - BOX["right"]
    inner_height = BOX["height"] - BOX["top"] - BOX["bottom"]

    def x(step: Any) -> Any:
        return BOX["left"] + (step - left) / (right - left) * inner_width

    def y(value: Any) -> Any:
        return BOX["top"] + (high - value) / (high - low) * inner_height

    parts = []
    for tick in ticks(low, high, 4):
        parts.append(f'<path class="grid" d="M{BOX["left"]},{y(tick):.1f}H{BOX["width"] - BOX["right"]}"/>')
        parts.append(f'<text class="y" x="{BOX["left"] - 6}" y="{y(tick) + 4:.1f}">{short(tick)}</text>')
    for tick in ticks(left, right, 4, whole=True):
        parts.append(f'<text class="x" x="{x(tick):.1f}" y="{BOX["height"] - 6}">{short(tick)}</text>')
    for line in chart.lines:
        for series, kind in ((line.points, "thin" if line.mean is not None else "line"), (line.mean, "line")):
            if series is not None:
                dashed = " dashed" if line.is_dashed else ""
                drawn = _path(x(series.steps), y(series.values))
                parts.append(f'<path class="{kind}{dashed} c{line.color}" d="{drawn}"/>')
    return (
        f'<svg viewBox="0 0 {BOX["width"]} {BOX["height"]}" role="img" tabindex="0" '
        f'aria-label="{escape(description)}">{"".join(parts)}</svg>'
    )


def _path(xs: np.ndarray, ys: np.ndarray) -> str:
    """A line through the points, broken where one is not a number; a lone point is a dot."""
    words, is_open = [], False
    for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
        if math.isfinite(y):
            words.append(f"{'L' if is_open else 'M'}{x:.1f},{y:.1f}" + ("" if is_open else "h0"))
        is_open = math.isfinite(y)
    return "".join(words)


def data(chart: Chart) -> dict[str, Any]:
    """What the script needs of it, in JSON's types."""
    lines = [
        {
            "run": line.run,
            "name": line.name,
            "color": line.color,
            "dashed": line.is_dashed,
            "points": _columns(line.points),
            "mean": None if line.mean is None else _columns(line.mean),
        }
        for line in chart.lines
    ]
    return {"byRun": chart.by_run, "lines": lines}


def _columns(series: Series) -> list[list[Any]]:
    values = [float(f"{value:.5g}") if math.isfinite(value) else None for value in series.values.tolist()]
    return [series.steps.tolist(), values]
