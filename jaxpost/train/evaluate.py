"""Held-out loss and metrics: exact means over the whole set, whatever the batches."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax

from jaxpost.errors import ConfigError
from jaxpost.metrics import Metric, Tally
from jaxpost.objectives.base import Batch, Objective
from jaxpost.options import one_of, option
from jaxpost.train.state import TrainState, merge


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When to evaluate."""

    eval_strategy: str = option("no", "Evaluate never (no), every eval_steps (steps) or after each epoch (epoch).")
    eval_steps: int | None = option(None, "Steps between evaluations; logging_steps by default.")
    eval_on_start: bool = option(False, "Also evaluate before the first step.")

    def __post_init__(self) -> None:
        one_of("eval_strategy", self.eval_strategy, ("no", "steps", "epoch"))
        if self.eval_steps is not None and self.eval_steps < 1:
            raise ConfigError(f"eval_steps is {self.eval_steps}; it must be at least 1")

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates at all."""
        return self.eval_strategy != "no" or self.eval_on_start


def make_eval_step(
    objective: Objective, annotate: Callable[[TrainState, Batch], Batch], graphdef: Any
) -> Callable[[TrainState, Batch], dict[str, Metric]]:
    """Compile-ready forward pass: the loss and the metrics of a batch."""

    def step(params: Any, frozen: Any, batch: Batch) -> dict[str, Metric]:
        loss, metrics = objective.loss(merge(graphdef, params, frozen), batch)
        return {"loss": loss, **metrics}

    compiled = jax.jit(step)
    return lambda state, batch: compiled(state.params, state.frozen, annotate(state, batch))


def evaluate(
    state: TrainState, step: Callable[[TrainState, Batch], dict[str, Metric]], batches: Iterable[Batch]
) -> dict[str, float]:
    """Means over all batches, named `eval_loss`, `eval_entropy`, ..."""
    tally = Tally()
    for batch in batches:
        tally.add(jax.device_get(step(state, batch)))
    return {f"eval_{name}": value for name, value in tally.values().items()}
