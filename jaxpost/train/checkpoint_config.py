"""When a run saves, and whether it continues one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxpost.errors import ConfigError
from jaxpost.options import Group, check_choices, option


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and whether to continue."""

    help_group = Group.CHECKPOINTS

    save_strategy: str = option(
        "steps",
        "Save never (no), every save_steps (steps) or after each epoch (epoch).",
        choices=("no", "steps", "epoch"),
        may_change=True,
    )
    save_steps: int = option(500, "Steps between checkpoints.", may_change=True)
    checkpoint_dir: str | None = option(
        None,
        "Folder of the checkpoints, also gs://BUCKET/PATH; by default checkpoints/ in output_dir.",
        may_change=True,
    )
    save_total_limit: int | None = option(
        None, "How many checkpoints to keep; older ones are deleted.", may_change=True
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Continue the run in output_dir: true or latest, a step, or false; by default where it is the same run.",
        may_change=True,
    )
    resume_with_changes: bool = option(
        False, "Continue a run also where flags or data differ from those that it was begun with.", may_change=True
    )
    load_best_model_at_end: bool = option(
        False, "End with the checkpoint that was best in evaluation, not the last.", may_change=True
    )
    metric_for_best_model: str | None = option(
        None, "Metric of evaluation that says which is best; loss by default.", may_change=True
    )
    greater_is_better: bool | None = option(
        None, "Whether more of it is better; by default unless it ends in loss.", may_change=True
    )

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("save_steps", "save_total_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if not self.load_best_model_at_end and (self.metric_for_best_model or self.greater_is_better is not None):
            raise ConfigError("metric_for_best_model and greater_is_better need --load_best_model_at_end")

    @property
    def best_metric(self) -> str:
        """The metric that says which checkpoint is best, as evaluation names it."""
        return f"eval_{(self.metric_for_best_model or 'loss').removeprefix('eval_')}"

    def goodness(self, metrics: Mapping[str, float]) -> float:
        """The more, the better; a metric that is missing or not a number is the worst."""
        more = not self.best_metric.endswith("loss") if self.greater_is_better is None else self.greater_is_better
        value = float(metrics.get(self.best_metric, math.nan))
        return -math.inf if math.isnan(value) else value if more else -value
