"""What a run leaves for its reader: curves.png and the model card."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpost.train.logging import METRICS_FILE, complete_rows
from jaxpost.train.panels import PANELS, Panel, matching

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5e5e5e")  # Okabe and Ito's
SMOOTH_FROM = 60  # points
_SECRET = r"(?i:(hub|api|auth|access)[_-]?(token|key)|password|secret)"
_SECRET_FLAG = rf"(--\S*?{_SECRET}\S*?[ =])\S+"


def write_curves(output_dir: Path, title: str | None = None) -> Path | None:
    """Draw metrics.jsonl into output_dir/curves.png, one panel for each kind of metric that has data.

    Args:
        output_dir: the run's folder.
        title: the figure's title; the folder's name by default.

    Returns:
        The picture's path, or None where there is nothing to draw.
    """
    from matplotlib.figure import Figure

    series = series_of(complete_rows(output_dir / METRICS_FILE))
    panels = [(panel, names) for panel in PANELS if (names := matching(panel, series))]
    if not panels:
        return None
    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 0.5 + 3.1 * rows), dpi=130, layout="constrained")
    figure.suptitle(title or output_dir.resolve().name, fontsize=14, fontweight="bold", parse_math=False)
    if any(len(values) >= SMOOTH_FROM for _, values in series.values()):
        figure.supxlabel(
            "thin: every logged value; thick: mean over a thirtieth of the run", fontsize=9, color="#666666"
        )
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for (panel, names), ax in zip(panels, axes, strict=False):
        _draw(ax, panel, {name: series[name] for name in names})
    for ax in axes:  # what zip left over
        ax.set_axis_off()
    path = output_dir / "curves.png"
    temporary = output_dir / "curves.tmp.png"
    figure.savefig(temporary)
    temporary.replace(path)
    return path


Points = tuple[list[int], list[float]]


def series_of(rows: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Points]:
    """name -> (steps, values) of every metric, in the order of their first rows; what is no number is left out."""
    series: dict[str, Points] = {}
    for _, row in rows:
        for name, value in row.items():
            with suppress(TypeError, ValueError, OverflowError):
                steps, values = series.setdefault(name, ([], []))
                values.append(float(value))
                steps.append(row["step"])
    return {name: points for name, points in series.items() if points[0]}


def _draw(ax: "Axes", panel: Panel, series: dict[str, Points]) -> None:
    from matplotlib.ticker import MaxNLocator

    for (name, (steps, values)), color in zip(series.items(), itertools.cycle(_COLORS)):
        if name.startswith("eval_"):
            ax.plot(steps, values, color=color, linestyle="--", marker="o", markersize=4, label=name, zorder=3)
        elif len(values) < SMOOTH_FROM or not panel.noisy:
            ax.plot(steps, values, color=color, marker="o" if len(values) < 20 else None, markersize=3, label=name)
        else:
            ax.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
            ax.plot(*running_mean(steps, np.asarray(values), 1000), color=color, label=name)
    ax.set_title(panel.title, loc="left", fontsize=11)
    ax.set_xlabel("step (optimizer updates)", fontsize=9)
    ax.set_ylabel(panel.label, fontsize=9)
    ax.tick_params(labelsize=8, color="#999999")
    largest = max((abs(v) for _, values in series.values() for v in values if math.isfinite(v)), default=1.0)
    if largest < 1e-3 or largest >= 1e4:  # no power of ten in the corner
        ax.yaxis.set_major_formatter("{x:.3g}" if largest < 1 else "{x:,.0f}")
    ax.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    ax.grid(color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    if len(series) > 1:
        ax.legend(fontsize=8, framealpha=0.8, edgecolor="none")


def running_mean(steps: Sequence[int] | np.ndarray, values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps, centred means over a thirtieth of the run, of the finite values only), at so many places at most."""
    half = len(values) // 60
    places = np.unique(np.linspace(0, len(values) - 1, min(len(values), most)).astype(int))
    windows = (values[max(0, place - half) : place + half + 1] for place in places)
    finite = (window[np.isfinite(window)] for window in windows)
    means = [window.mean() if len(window) else math.nan for window in finite]
    return np.asarray(steps)[places], np.asarray(means)


def write_model_card(
    output_dir: Path,
    *,
    base_model: str,
    dataset: str,
    method: str,
    config: dict[str, Any],
    versions: dict[str, str],
    metrics: dict[str, float],
    command: str,
) -> Path:
    """Write output_dir/README.md, the model card.

    Args:
        output_dir: holds the saved model; what lies there (an adapter, curves.png) is mentioned.
        base_model: Hub id or local path; of a local path only the last part is told.
        dataset: likewise.
        method: the command's name.
        config: the settings to list, as in config.yaml.
        versions: package -> version.
        metrics: name -> final value.
        command: the command line that repeats the run.
    """
    import yaml
    from huggingface_hub import ModelCardData

    adapter = (output_dir / "adapter_config.json").exists()
    front = ModelCardData(
        library_name="jaxpost",
        base_model=base_model if _on_the_hub(base_model) else None,
        datasets=[dataset] if _on_the_hub(dataset) else None,
        tags=["jaxpost", method, *(["lora"] if adapter else [])],
    )
    base, data = _shown(base_model), _shown(dataset)
    kind = "A PEFT adapter for" if adapter else "A fine-tuned version of"
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {output_dir.resolve().name}",
        f"{kind} {base}, trained on {data} with jaxpost's `{method}`.",
    ]
    if metrics:
        digits = {name: f"{value:.5g}" if isinstance(value, float) else str(value) for name, value in metrics.items()}
        rows = "".join(f"\n| {name} | {value} |" for name, value in digits.items())
        parts.append(f"## Results\n\n| metric | last value |\n|---|---|{rows}")
    if (output_dir / "curves.png").exists():
        parts.append("![Training curves](curves.png)")
    command = re.sub(_SECRET_FLAG, r"\1***", command)
    parts.append(f"## How it was made\n\n```sh\n{command}\n```")
    plain = json.loads(json.dumps({name: config[name] for name in config if not is_secret(name)}, default=str))
    settings = yaml.safe_dump(plain, sort_keys=False)
    parts.append(f"<details><summary>All settings</summary>\n\n```yaml\n{settings}```\n\n</details>")
    parts.append(" · ".join(f"{package} {version}" for package, version in versions.items()))
    path = output_dir / "README.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def is_secret(name: str) -> bool:
    """Whether a setting of this name is nobody's business."""
    return re.search(_SECRET, name) is not None


def _on_the_hub(name: str) -> bool:
    local = name.startswith(".") or name.endswith((".gguf", ".json", ".jsonl", ".parquet")) or Path(name).exists()
    return not local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def _shown(name: str) -> str:
    return f"`{name if _on_the_hub(name) else Path(name).name}`"
