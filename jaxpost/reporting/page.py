"""The report's page: one file that needs no other. All that comes from runs is escaped."""

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from html import escape
from importlib.resources import files
from typing import Any

from jaxpost.reporting.charts import BOX, NUM_COLORS, Chart, charts_of, data, svg
from jaxpost.reporting.completions import Example
from jaxpost.reporting.runs import NEVER_COMPARED, Run, best
from jaxpost.train.panels import PANELS, best_of, matching

NOTHING = '<span class="soft">&ndash;</span>'
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
Rows = list[tuple[str, list[str]]]


def page(runs: Sequence[Run], defaults: Callable[[Run], Mapping[str, Any] | None], methods: Mapping[str, str]) -> str:
    """The report on some runs.

    Args:
        runs: of which one at least has rows.
        defaults: of a run's settings; None where they are not known.
        methods: name of a config's class -> name of the method.
    """
    room = files("jaxpost.reporting")
    charts = charts_of(runs)
    name = escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    numbers = {"box": BOX, "runs": [run.name for run in runs], "charts": [data(chart) for chart in charts]}
    body = [
        f"<header><h1>{name}</h1>{_notes(runs)}</header>",
        _switches(runs) if len(runs) > 1 else "",
        f"<main><section><h2>Overview</h2>{_table(runs, _overview(runs, methods))}</section>",
        _metrics(runs),
        _curves(runs, charts),
        _settings(runs, defaults),
        _completions(runs),
        f'</main><footer class="soft">Made by jaxpost report, {time.strftime("%Y-%m-%d %H:%M")}</footer>',
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name} · jaxpost</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<style>\n{room.joinpath('page.css').read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f'\n<script type="application/json" id="data">{_json(numbers)}</script>\n'
        f"<script>\n{room.joinpath('page.js').read_text(encoding='utf-8')}</script>\n</body>\n</html>\n"
    )


def _json(value: Any) -> str:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _notes(runs: Sequence[Run]) -> str:
    notes = [f"<li><b>{escape(run.name)}</b>: {escape(note)}</li>" for run in runs for note in run.notes]
    return f'<ul class="notes" aria-label="Notes">{"".join(notes)}</ul>' if notes else ""


def _switches(runs: Sequence[Run]) -> str:
    box = '<input type="checkbox" checked autocomplete="off" data-run="{}">'
    boxes = [f"<label>{box.format(i)}{_key(i)}{escape(run.name)}</label>" for i, run in enumerate(runs)]
    return f'<div class="runs" role="group" aria-label="Runs whose curves are shown">{"".join(boxes)}</div>'


def _key(number: int, *, dashed: bool = False) -> str:
    return f'<i class="key c{number % NUM_COLORS}{" dashed" if dashed else ""}" aria-hidden="true"></i>'


def _table(runs: Sequence[Run], rows: Rows) -> str:
    """A row for each name, a column for each run; of one run a list. The cells are HTML."""
    if len(runs) == 1:
        facts = "".join(f"<div><dt>{_broken(name)}</dt><dd>{cell}</dd></div>" for name, [cell] in rows)
        return f'<dl class="facts">{facts}</dl>'
    names = [f'<th scope="col">{_key(number)} {escape(run.name)}</th>' for number, run in enumerate(runs)]
    head = f"<thead><tr><td></td>{''.join(names)}</tr></thead>"
    lines = [
        f'<tr><th scope="row">{_broken(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    ]
    table = f"<table>{head}<tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="Runs side by side">{table}</div>'


def _broken(name: str) -> str:
    """A name that may go on in the next line after a part of it."""
    return re.sub(r"([_/])(?=.)", r"\1<wbr>", escape(name))


def _overview(runs: Sequence[Run], methods: Mapping[str, str]) -> Rows:
    """Facts that at least one run knows."""
    facts: dict[str, Callable[[Run], str]] = {
        "state": lambda run: f'<span class="{run.status[0]}">{escape(run.status[1])}</span>',
        "method": lambda run: escape(methods.get(run.sessions[-1].config, "")) if run.sessions else "",
        "steps": _steps,
        "epochs": lambda run: "" if run.epoch is None else f"{run.epoch:.3g}",
        "tokens": lambda run: _count(run.last("num_tokens")),
        "took": _took,
        "tokens / s": lambda run: _count(run.typical("tokens_per_second")),
        "tokens / s / device": lambda run: _count(run.typical("device_tokens_per_second")),
        "MFU": lambda run: "" if (value := run.typical("mfu")) is None else f"{value:.1%}",
        "where time went": lambda run: _shares(run.shares),
        "went on from": lambda run: ", ".join(f"step {step}" for step in run.resumed),
        "skipped steps": lambda run: _count(run.last("skipped_steps")),
    }
    rows = [(name, [fact(run) or NOTHING for run in runs]) for name, fact in facts.items()]
    return [(name, cells) for name, cells in rows if set(cells) != {NOTHING}]


def _steps(run: Run) -> str:
    total = run.sessions[-1].total if run.sessions else 0
    return f"{run.last_step:,}" + (f" of {total:,}" if total else "")


def _count(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def _took(run: Run) -> str:
    if run.seconds is None:
        return ""
    seconds, is_all = run.seconds
    text = f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
    return text if is_all else f"{text}<small>{'at least' if run.sessions else 'in steps'}</small>"


def _shares(shares: Mapping[str, float]) -> str:
    """A bar, and the same in words."""
    if not shares:
        return ""
    named = [(place, name, share) for place, (name, share) in enumerate(shares.items())]
    bar = "".join(f'<i class="s{place}" style="flex:{share:.4f}"></i>' for place, _, share in named)
    words = "".join(f'<span><i class="s{place}"></i>{escape(name)} {share:.0%}</span>' for place, name, share in named)
    return f'<div class="bar" aria-hidden="true">{bar}</div><div class="shares">{words}</div>'


def number(value: float) -> str:
    """Five digits that count."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if 1e3 <= abs(value) < 1e15 else f"{value:.5g}"


def _metrics(runs: Sequence[Run]) -> str:
    """The last and the best value of each metric."""
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    main = list(dict.fromkeys(name for panel in PANELS for name in matching(panel, names)))
    rest = [name for name in names if name not in main]
    parts = [_table(runs, [(name, _values(runs, name)) for name in main])] if main else []
    if rest:
        table = _table(runs, [(name, _values(runs, name)) for name in rest])
        parts.append(f"<details><summary>{len(rest)} more metrics</summary>{table}</details>")
    words = '<p class="soft">The last value; below it the best one, where one is better than another.</p>'
    return f"<section><h2>Metrics</h2>{words}{''.join(parts)}</section>" if parts else ""


def _values(runs: Sequence[Run], name: str) -> list[str]:
    which = best_of(name)
    lasts = [run.last(name) for run in runs]
    finite = [last for last in lasts if last is not None and math.isfinite(last)]
    winner = (min if which == "least" else max)(finite) if which and len(finite) > 1 else None
    cells = []
    for run, last in zip(runs, lasts, strict=True):
        if last is None:
            cells.append(NOTHING)
            continue
        text, found = number(last), best(run.series[name], which)
        text = f"<b>{text}</b>" if last == winner else text
        below = "" if found is None else f"<small>best {number(found[0])} at step {found[1]:,}</small>"
        cells.append(text + below)
    return cells


def _curves(runs: Sequence[Run], charts: Sequence[Chart]) -> str:
    drawn = [(chart.is_main, _figure(runs, place, chart)) for place, chart in enumerate(charts)]
    main, rest = ("".join(text for is_main, text in drawn if is_main is wanted) for wanted in (True, False))
    if not drawn:
        return ""
    count = sum(not chart.is_main for chart in charts)
    more = f'<details><summary>{count} more</summary><div class="charts">{rest}</div></details>' if rest else ""
    smooth = any(line.mean is not None for chart in charts for line in chart.lines)
    words = "By step. Dashed: evaluation." + (" Pale: as logged, below its running mean." if smooth else "")
    return f'<section><h2>Curves</h2><p class="soft">{words}</p><div class="charts">{main}</div>{more}</section>'


def _figure(runs: Sequence[Run], place: int, chart: Chart) -> str:
    told = [
        f"{runs[line.run].name}, {line.name}: {number(float(line.points.values[-1]))} at step {line.points.steps[-1]}"
        for line in chart.lines
    ]
    picture = svg(chart, f"{chart.title} by step. Last values: {'; '.join(told)}. Arrow keys read values.")
    names = list(dict.fromkeys((line.name, line.color, line.is_dashed) for line in chart.lines))
    keys = ""
    if not chart.by_run:
        words = "".join(f"<span>{_key(color, dashed=dashed)}{escape(name)}</span>" for name, color, dashed in names)
        keys = f'<div class="keys">{words}</div>'
    can_log = all(bool((line.points.values > 0).all()) for line in chart.lines)
    button = '<button type="button" hidden aria-pressed="false">log</button>' if can_log else ""
    unit = "" if chart.label == chart.title.lower().replace("_", " ") else escape(chart.label)
    title = f"<span><strong>{_broken(chart.title)}</strong> <small>{unit}</small></span>"
    return f'<figure data-chart="{place}"><figcaption>{title}{button}</figcaption>{keys}{picture}</figure>'


def _settings(runs: Sequence[Run], defaults: Callable[[Run], Mapping[str, Any] | None]) -> str:
    """Those that differ, between runs or from their defaults, and all of them."""
    names = sorted({name for run in runs for name in run.settings})
    if not names:
        return ""
    missing = object()
    if len(runs) > 1:
        title = "Settings that differ"
        differing = [
            n for n in names if n not in NEVER_COMPARED and _differ([run.settings.get(n, missing) for run in runs])
        ]
    else:
        usual = defaults(runs[0])
        title = "Settings" if usual is None else "Settings that are not the default"
        own = runs[0].settings
        differing = [name for name in names if usual is not None and own[name] != usual.get(name, missing)]
    parts = [_table(runs, _setting_rows(runs, differing))] if differing else []
    if not parts and len(runs) > 1:
        parts = ['<p class="soft">None.</p>']
    table = _table(runs, _setting_rows(runs, names))
    parts.append(f"<details><summary>All {len(names)} settings</summary>{table}</details>")
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values[1:])


def _setting_rows(runs: Sequence[Run], names: Sequence[str]) -> Rows:
    def cell(run: Run, name: str) -> str:
        if name not in run.settings:
            return NOTHING
        value = run.settings[name]
        text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
        return f"<code>{escape(text)}</code>"

    return [(name, [cell(run, name) for run in runs]) for name in names]


def _completions(runs: Sequence[Run]) -> str:
    parts = []
    for place, run in enumerate(runs):
        for generation in run.generations:
            name = f"{_key(place)} {escape(run.name)}, " if len(runs) > 1 else ""
            head = f"{name}step {generation.step:,}"
            words = f"<small>{len(generation.examples)} of {generation.num_completions}, by their rewards</small>"
            cards = "".join(_example(each) for each in generation.examples)
            parts.append(f'<h3>{head} {words}</h3><div class="examples">{cards}</div>')
    return f"<section><h2>Completions</h2>{''.join(parts)}</section>" if parts else ""


def _example(example: Example) -> str:
    rewards = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{number(value)}</dd></div>" for name, value in example.rewards.items()
    )
    said = escape(example.completion) or NOTHING
    return (
        f'<article class="example"><p class="soft">{escape(example.prompt)}</p><p>{said}</p>'
        f"{f'<dl>{rewards}</dl>' if rewards else ''}</article>"
    )
