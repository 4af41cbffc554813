"""What is told of completions: metrics by TRL's names, a table of some and a file of all of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpost.metrics import Greatest, Least, Mean, Metric
from jaxpost.rl.generate import Completion
from jaxpost.rl.rewards import Scored

SHOWN_CHARACTERS = 400


class Scores(NamedTuple):
    """Rewards of N completions, those of a prompt one after the other.

    Attributes:
        names: of the F functions.
        scored: what they say.
        per_prompt: completions of a prompt.
        weights: of the functions; None for 1.
    """

    names: list[str]
    scored: Scored
    per_prompt: int
    weights: Sequence[float] | None

    @property
    def summed(self) -> np.ndarray:
        """The weighted sum of what is known, [N]; NaN where nothing is."""
        rewards = self.scored.rewards
        weights = np.ones(rewards.shape[1]) if self.weights is None else np.asarray(self.weights)
        return np.where(np.isnan(rewards).all(axis=1), np.nan, np.nansum(rewards * weights, axis=1))


def completion_metrics(completions: Sequence[Completion]) -> dict[str, Metric]:
    """How many tokens the policy drew, and how many completions were cut."""
    lengths = np.array([completion.num_own for completion in completions], np.float32)
    ended = np.array([completion.ended for completion in completions], bool)
    metrics: dict[str, Metric] = {"completions/clipped_ratio": _mean(~ended)}
    for name, values in (("length", lengths), ("terminated_length", lengths[ended])):
        metrics[f"completions/mean_{name}"] = _mean(values)
        if len(values):
            metrics[f"completions/min_{name}"] = Least(values.min())
            metrics[f"completions/max_{name}"] = Greatest(values.max())
    return metrics


def reward_metrics(scores: Scores) -> dict[str, Metric]:
    """Rewards, by function and together; `excluded` is the share without one, `failed` what of it is a fault."""
    metrics: dict[str, Metric] = {}
    for column, name in enumerate(scores.names):
        values = scores.scored.rewards[:, column]
        known = values[~np.isnan(values)]
        metrics[f"rewards/{name}/mean"] = _mean(known)
        metrics[f"rewards/{name}/std"] = _one(_std(known))
        metrics[f"rewards/{name}/excluded"] = _mean(np.isnan(values))
        metrics[f"rewards/{name}/failed"] = _mean(scores.scored.failed[:, column])
    summed = scores.summed
    metrics["reward"] = _mean(summed[~np.isnan(summed)])
    metrics["reward_std"] = _one(_std(summed[~np.isnan(summed)]))
    groups = [group[~np.isnan(group)] for group in summed.reshape(-1, scores.per_prompt)]
    metrics["frac_reward_zero_std"] = _mean(np.array([np.isclose(_std(group), 0) for group in groups]))
    return metrics | {name: _mean(np.asarray(values)) for name, values in scores.scored.metrics.items()}


def _mean(values: np.ndarray) -> Mean:
    return Mean(np.float32(np.sum(values)), np.float32(len(values)))  # pyright: ignore[reportArgumentType]


def _one(value: float) -> Mean:
    return Mean(np.float32(value), np.float32(1))  # pyright: ignore[reportArgumentType]


def _std(values: np.ndarray) -> float:
    """Of a sample."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


class Recorder:
    """Keeps all completions of a run in `completions/`, a file a generation, and shows some of them.

    Args:
        folder: of the run.
        names: of the reward functions.
        shown: completions to print; 0 for none.
    """

    def __init__(self, folder: Path, names: Sequence[str], shown: int):
        self._folder, self._names, self._shown = folder / "completions", list(names), shown

    def __call__(self, step: int, columns: dict[str, list[Any]]) -> None:
        """Columns `prompt`, `completion`, one a reward function, `advantage`, and what functions logged.

        `step` counts from 0; the file has the number of the first step that learns from it.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = {"step": [step + 1] * len(columns["prompt"]), **{name: _cells(x) for name, x in columns.items()}}
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"completions_{step + 1:05d}.parquet"
        partial = path.with_suffix(".writing")
        pq.write_table(pa.table(table), partial)
        partial.replace(path)
        if self._shown:
            self._print(step, table)

    def _print(self, step: int, table: dict[str, list[Any]]) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        names = ["prompt", "completion", *self._names, "advantage"]
        shown = Table(*names, title=f"step {step + 1}", show_lines=True)
        for i in range(min(self._shown, len(table["prompt"]))):
            cells = [table[name][i] for name in names]
            texts = [f"{cell:.3g}" if isinstance(cell, float) else str(cell)[-SHOWN_CHARACTERS:] for cell in cells]
            shown.add_row(*map(Text, texts))
        Console().print(shown)


def _cells(values: list[Any]) -> list[Any]:
    """Values that a column of a file can hold together: numbers and texts as they are, the rest as JSON."""
    if all(value is None or isinstance(value, int | float | str) for value in values):
        kinds = {type(value) for value in values if value is not None}
        return values if len(kinds) <= 1 or kinds <= {int, float, bool} else [str(value) for value in values]
    return [json.dumps(value, ensure_ascii=False, default=str) for value in values]
