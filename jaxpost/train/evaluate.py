"""Held-out loss and metrics: exact means over the whole set, whatever the batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxpost.data.loader import Loader
from jaxpost.errors import ConfigError
from jaxpost.metrics import Metric, Tally
from jaxpost.objectives.base import Batch, Objective
from jaxpost.options import Group, check_choices, option
from jaxpost.processes import check, fetch
from jaxpost.sharding import put
from jaxpost.train.reference import Reference
from jaxpost.train.state import TrainState, merge
from jaxpost.train.step import make_annotate


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When to evaluate."""

    help_group = Group.EVALUATION

    eval_strategy: str = option(
        "no",
        "Evaluate never (no), every eval_steps (steps) or after each epoch (epoch).",
        choices=("no", "steps", "epoch"),
        may_change=True,
    )
    eval_steps: int | None = option(None, "Steps between evaluations; logging_steps by default.", may_change=True)
    eval_on_start: bool = option(False, "Also evaluate before the first step.", may_change=True)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.eval_steps is not None and self.eval_steps < 1:
            raise ConfigError(f"eval_steps is {self.eval_steps}; it must be at least 1")

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates at all."""
        return self.eval_strategy != "no" or self.eval_on_start


class EvalPrediction(NamedTuple):
    """What `compute_metrics` is given; the names are those of transformers.

    Attributes:
        predictions: rewards, float32: [N, 2] of the chosen and the rejected of each pair, or [N] of judged completions.
        label_ids: [N], 0 for each pair, whose first is the better one; or 1 for desirable completions and 0 for others.
    """

    predictions: np.ndarray
    label_ids: np.ndarray


ComputeMetrics = Callable[[EvalPrediction], Mapping[str, float]]


class Evaluation:
    """Metrics of a state over a whole set, by names that begin with `eval_`.

    Args:
        objective: the method.
        graphdef: of the model, from `create_state`.
        reference: None where the method needs none.
        loader: has each example once.
        mesh: where batches go.
        compute_metrics: makes further metrics of what the state predicts.
    """

    def __init__(
        self,
        objective: Objective,
        graphdef: Any,
        reference: Reference | None,
        loader: Loader,
        mesh: Mesh,
        compute_metrics: ComputeMetrics | None = None,
    ):
        self.loader, self.mesh, self.compute_metrics = loader, mesh, compute_metrics
        annotate = make_annotate(objective, graphdef, reference, learns=False)

        @jax.jit
        def measure(params: Any, frozen: Any, batch: Batch) -> dict[str, Metric]:
            loss, metrics = objective.loss(merge(graphdef, params, frozen), batch)
            return {"loss": loss, **metrics}

        @jax.jit
        def judge(params: Any, frozen: Any, batch: Batch) -> Array:
            return objective.rewards(merge(graphdef, params, frozen), batch)

        self._measure = lambda state, batch: measure(state.params, state.frozen, annotate(state, batch))
        self._judge = lambda state, batch: judge(state.params, state.frozen, annotate(state, batch))

    def __call__(self, state: TrainState) -> dict[str, float]:
        """The metrics of a state."""
        tally = Tally()
        for batch in self.loader(0, partial(put, mesh=self.mesh)):
            check(batch)
            tally.add(jax.device_get(self._measure(state, batch)))
        values = tally.values()
        if self.compute_metrics is not None:
            given = {
                name.removeprefix("eval_"): value for name, value in self.compute_metrics(self.predict(state)).items()
            }
            values |= {name: float(value) for name, value in given.items()}
        return {f"eval_{name}": value for name, value in values.items()}

    def names(self, state: TrainState) -> set[str]:
        """The names of the metrics, but for those that `compute_metrics` makes; nothing is computed."""
        batch = put(self.loader.empty(self.loader.lengths[0]), self.mesh)
        return {f"eval_{name}" for name in jax.eval_shape(self._measure, state, batch)}

    def predict(self, state: TrainState) -> EvalPrediction:
        """How good a state finds each example."""
        packs = self.loader.packs
        rewards = by_example(partial(self._judge, state), self.loader, self.mesh)
        members = np.stack([packs.members(i) for i in range(len(packs))])
        facts = packs.facts or {}
        if "label" in facts:
            return EvalPrediction(rewards[members[:, 0]], facts["label"][members[:, 0]].astype(np.int64))
        return EvalPrediction(rewards[members], np.zeros(len(members), np.int64))


def by_example(values: Callable[[Batch], Any], loader: Loader, mesh: Mesh) -> Any:
    """What a function of batches says of every example, float32 [N, ...].

    Args:
        values: a batch -> [B, S, ...], or a tree of such, which makes one of what is said.
        loader: has each example once.
        mesh: where batches go.
    """
    found, count = None, len(loader.packs.examples)
    for step, batch in enumerate(loader(0, partial(put, mesh=mesh))):
        check(batch)
        said, members = fetch(values(batch)), loader.members(step)
        if found is None:
            found = jax.tree.map(lambda part: np.zeros((count, *part.shape[2:]), np.float32), said)
        for whole, part in zip(jax.tree.leaves(found), jax.tree.leaves(said), strict=True):
            for row, numbers in zip(part, members, strict=True):
                whole[numbers] = row[: len(numbers)]
    return found
