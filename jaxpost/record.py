"""What a run says of itself: its log, and what is left of it when it has ended."""

import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxpost.methods import changed_fields, config_yaml
from jaxpost.processes import is_main
from jaxpost.train.logging import METRICS_FILE, RunLog, complete_rows
from jaxpost.train.report import write_curves, write_model_card


class TrainOutput(dict[str, float]):
    """The last metrics of training and evaluation, and what transformers' `train()` returns.

    Attributes:
        global_step: optimizer steps of the run.
        training_loss: mean of the logged losses, each by the steps that it is the mean of.
        metrics: train_loss, train_runtime (seconds of this call), train_steps_per_second and epoch.
    """

    def __init__(self, last: Mapping[str, float], rows: list[dict[str, float]], seconds: float, start: int):
        super().__init__(last)
        losses = [row for row in rows if "loss" in row]
        self.global_step = int(max((row["step"] for row in rows), default=0))
        self.training_loss = mean_loss(losses)
        self.metrics = {
            "train_runtime": seconds,
            "train_steps_per_second": (self.global_step - start) / seconds,
            "train_loss": self.training_loss,
            "epoch": losses[-1]["epoch"] if losses else 0.0,
        }


def mean_loss(rows: list[dict[str, float]]) -> float:
    """Of logged steps, each row's loss counted for the steps since the row before."""
    steps = [0, *(row["step"] for row in rows)]
    weights = [after - before for before, after in pairwise(steps)]
    total = sum(weights)
    return sum(weight * row["loss"] for weight, row in zip(weights, rows, strict=True)) / total if total else 0.0


def history(output_dir: Path) -> list[dict[str, float]]:
    """What was logged, oldest first, each row with its `step`; empty on all processes but the main one."""
    rows = complete_rows(output_dir / METRICS_FILE) if is_main() else ()
    return [{name: value if name == "step" else float(value) for name, value in row.items()} for _, row in rows]


def open_log(output_dir: Path, args: Any, notes: list[str], total: int, start: int) -> RunLog:
    """The log of a run that has so many steps and goes on from one; writes config.yaml and tells the notes."""
    log = RunLog(output_dir, args, total_steps=total, start_step=start, is_main=is_main())
    if is_main():
        (output_dir / "config.yaml").write_text(config_yaml(args), encoding="utf-8")
    for note in notes:
        log.message(note)
    if start:
        log.message(f"going on from step {start} of {total}" if start < total else f"all {total} steps are done")
    return log


def last_metrics(rows: list[dict[str, float]], best: dict[str, float]) -> dict[str, float]:
    """The last value of each, in whose place those of the best model may stand."""
    metrics: dict[str, float] = {}
    for row in rows:
        metrics |= row
    return metrics | best


def write_report(output_dir: Path, method: str, args: Any, model: str, metrics: dict[str, float]) -> None:
    """Curves and model card."""
    write_curves(output_dir)
    write_model_card(
        output_dir,
        base_model=model,
        dataset=args.dataset_name or "rows given in Python",
        method=method,
        config=changed_fields(args),
        versions={name: version(name) for name in ("jaxpost", "jax", "flax", "optax", "transformers")},
        metrics=metrics,
        command=shlex.join(["jaxpost", *sys.argv[1:]]),
    )
