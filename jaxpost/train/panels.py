"""What belongs together when metrics are shown: kinds of metrics in the order of interest, and where time goes."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

EVAL = r"eval_(?:.+?_)??"  # evaluation, of one of several datasets
BEST_FROM = {"least": min, "most": max}
_NO_BEST = r"rewards/rejected|min_reward|max_reward"


class Panel(NamedTuple):
    """A kind of metrics.

    Attributes:
        title: of its plot.
        label: what the y axis shows, with its unit.
        names: a pattern of whole metric names.
        noisy: whether the values scatter.
        best: which value is the best one, least or most; empty where none is.
    """

    title: str
    label: str
    names: str
    noisy: bool = True
    best: str = ""


PANELS = (
    Panel("Loss", "loss", r"loss", best="least"),
    Panel("Learning rate", "learning rate", r"learning_rate", noisy=False),
    Panel("Gradient norm, before clipping", "L2 norm", r"grad_norm"),
    Panel("Speed", "tokens / s", r"tokens_per_second"),
    Panel("Use of the devices", "share of their peak", r"mfu"),
    Panel("Accuracy", "fraction", r"mean_token_accuracy|rewards/accuracies|accuracy", best="most"),
    Panel("Entropy", "nats / token", r"entropy|policy/entropy_avg"),
    Panel(
        "Rewards",
        "reward",
        r"reward|rewards/(chosen|rejected|margins)|rewards/.+/mean|(min|mean|max)_reward|margin",
        best="most",
    ),
    Panel("Spread of rewards", "standard deviation", r"reward_std|rewards/.+/std"),
    Panel("KL to the reference", "nats", r"kl|objective/kl"),
    Panel("Completion length", "tokens", r"completions/(min|mean|max)_length"),
    Panel("Parts of the loss", "loss", r"loss/(policy|value)_avg"),
    Panel("Completions that were cut", "fraction", r"completions/clipped_ratio"),
)


def matching(panel: Panel, names: Iterable[str]) -> list[str]:
    """The metrics of a panel, those of evaluations (`eval_`, `eval_<dataset>_`) among them."""
    return [name for name in names if re.fullmatch(rf"({EVAL})?({panel.names})", name)]


def base_name(name: str) -> str:
    """The metric that an evaluation has measured, or the metric itself."""
    for panel in PANELS:
        if found := re.fullmatch(rf"(?:{EVAL})?({panel.names})", name):
            return found[1]
    return name.removeprefix("eval_")


def best_of(name: str) -> str:
    """Which value of a metric is the best: least, most or, where none is, an empty string."""
    base = base_name(name)
    found = next((panel for panel in PANELS if re.fullmatch(panel.names, base)), None)
    return "" if found is None or re.fullmatch(_NO_BEST, base) else found.best


def time_shares(row: Mapping[str, float]) -> dict[str, float]:
    """Where the time of the steps of a log line went, of all of it; empty for a line without times.

    `update` is what is left: the device's work on the step, and the host's.
    """
    purposes = {"rollout": "generation", "reward": "reward", "appraise": "appraise", "input": "input"}
    besides = {"save": "save", "evaluation": "evaluation"}
    step = row.get("step_time", 0.0)
    within = {shown: row[f"{name}_time"] for shown, name in purposes.items() if f"{name}_time" in row}
    beside = {shown: row[f"{name}_time"] for shown, name in besides.items() if f"{name}_time" in row}
    whole = step + sum(beside.values())
    if not (whole > 0 and math.isfinite(whole)):
        return {}
    times = {"update": max(0.0, step - sum(within.values())), **within, **beside}
    return {name: seconds / whole for name, seconds in times.items()}
