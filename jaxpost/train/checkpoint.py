"""Checkpoints of a run: Orbax, asynchronous, one unit of state at step boundaries."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from jaxpost.errors import CheckpointError, ConfigError, one_line
from jaxpost.objectives.base import Batch
from jaxpost.options import one_of, option
from jaxpost.sharding import path_of
from jaxpost.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and whether to continue."""

    save_strategy: str = option("steps", "Save never (no), every save_steps (steps) or after each epoch (epoch).")
    save_steps: int = option(500, "Steps between checkpoints.")
    save_total_limit: int | None = option(None, "How many checkpoints to keep; older ones are deleted.")
    resume_from_checkpoint: str | None = option(None, "Continue the run in output_dir: true or latest, or a step.")

    load_best_model_at_end: bool = option(False, "End with the checkpoint that was best in evaluation, not the last.")
    metric_for_best_model: str | None = option(None, "Metric of evaluation that says which is best; loss by default.")
    greater_is_better: bool | None = option(None, "Whether more of it is better; by default unless it ends in loss.")

    def __post_init__(self) -> None:
        one_of("save_strategy", self.save_strategy, ("no", "steps", "epoch"))
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

    def goodness(self, metrics: dict[str, float]) -> float:
        """The more, the better; a metric that is missing or not a number is the worst."""
        more = not self.best_metric.endswith("loss") if self.greater_is_better is None else self.greater_is_better
        value = float(metrics.get(self.best_metric, math.nan))
        return -math.inf if math.isnan(value) else value if more else -value


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Args:
        folder: made when something is saved.
        config: when to save, and whether to continue.
        data: fingerprint of the run's batches; a resumed run must read the same ones.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, data: str = ""):
        self.folder = folder
        self.config = config
        self.data = data

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Made when it is first needed: it creates the folder."""
        kept, best = preservation.LatestN(self.config.save_total_limit), None
        if self.config.load_best_model_at_end:
            best = self.config.goodness
            kept = preservation.AnyPreservationPolicy([kept, preservation.BestN(get_metric_fn=best, n=1)])
        options = ocp.CheckpointManagerOptions(preservation_policy=kept, best_fn=best, create=True)
        return ocp.CheckpointManager(self.folder.absolute(), options=options)

    def save(
        self,
        state: TrainState,
        step: int,
        facts: dict[str, Any],
        metrics: dict[str, float],
        kept: Sequence[Batch] = (),
    ) -> None:
        """Start saving; training goes on while the files are written.

        Args:
            state: trainable parameters, optimizer and step are saved; frozen arrays come from the base model.
            step: the state's step.
            facts: small JSON values that must survive with it.
            metrics: of its evaluation.
            kept: batches that steps after this one need and that cannot be made again.
        """
        if self._manager.latest_step() == step:
            return
        facts = {**facts, "arrays": _arrays(state), "data": self.data}
        items: dict[str, Any] = {"state": ocp.args.StandardSave(_saved(state))}
        if kept:
            facts["kept"] = [{name: [str(x.dtype), x.shape] for name, x in batch.items()} for batch in kept]
            items["kept"] = ocp.args.StandardSave(list(kept))
        items["facts"] = ocp.args.JsonSave(facts)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The state to continue from, or None for a fresh run.

        Args:
            state: a fresh state: gives shapes, dtypes and layout, and the frozen arrays.

        Raises:
            ConfigError: the folder holds a run and nobody asked to continue it, or there is no such step.
            CheckpointError: the checkpoint does not fit this model, this optimizer or this data.
        """
        steps = sorted(self._manager.all_steps()) if self.folder.is_dir() else []
        asked = self.config.resume_from_checkpoint
        if asked in (None, "", "false", "False"):
            if steps:
                raise ConfigError(
                    f"{self.folder.parent} holds a run at step {steps[-1]}: continue it with "
                    "--resume_from_checkpoint true, or give another --output_dir"
                )
            return None
        return self._restored(state, self._step(str(asked), steps))

    def kept(self, state: TrainState, facts: dict[str, Any]) -> list[Batch]:
        """The batches that were kept with a state that was restored, on every device; `facts` are taken from."""
        layout = state.step.sharding
        shapes = [
            {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, (dtype, shape) in batch.items()}
            for batch in facts.pop("kept", [])
        ]
        return self._read(int(state.step), "kept", ocp.args.StandardRestore(shapes)) if shapes else []

    def best(self, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """The state that was best in evaluation, and its metrics; `state` gives shapes and layout."""
        self._manager.wait_until_finished()
        step = self._manager.best_step()
        assert step is not None, "the last step is always evaluated and saved"
        return self._restored(state, step)[0], self._manager.metrics(step) or {}

    def _restored(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _saved(state))
        facts = self._read(step, "facts", ocp.args.JsonRestore())
        self._check(step, facts.pop("arrays"), _arrays(state))
        if facts.pop("data") != self.data:
            raise CheckpointError(
                f"{self.folder / str(step)} was saved by a run over other batches: the rows, the tokenizer, its chat "
                "template, the seed, the batch size or a data flag differ; give those of config.yaml, or another "
                "--output_dir"
            )
        return dataclasses.replace(state, **self._read(step, "state", ocp.args.StandardRestore(abstract))), facts

    def _read(self, step: int, item: str, how: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{self.folder / str(step)} cannot be restored: {one_line(error)}") from error

    def _check(self, step: int, saved: dict[str, str], wanted: dict[str, str]) -> None:
        """Compare before reading: Orbax casts dtypes silently, and leaves reads behind when a shape is wrong."""
        differing = [
            f"{path} is {saved.get(path, 'missing')}, expected {wanted.get(path, 'nothing')}"
            for path in sorted(saved.keys() | wanted.keys())
            if saved.get(path) != wanted.get(path)
        ]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise CheckpointError(
                f"{self.folder / str(step)} is of another model or optimizer: {'; '.join(differing[:3])}{more}"
            )

    def _step(self, asked: str, steps: list[int]) -> int:
        if not steps:
            raise ConfigError(f"--resume_from_checkpoint {asked}: {self.folder} holds no checkpoint")
        if asked.lower() in ("true", "latest"):
            return steps[-1]
        if not asked.isdigit() or int(asked) not in steps:
            raise ConfigError(f"--resume_from_checkpoint {asked}: it takes true, latest or one of the steps {steps}")
        return int(asked)

    def close(self) -> None:
        """Block until the last save is on disk; raises what went wrong with it."""
        if "_manager" in vars(self):
            self._manager.wait_until_finished()
            self._manager.close()


def _saved(state: TrainState) -> dict[str, Any]:
    others = {"reference": state.reference, "memory": state.memory}
    kept = {name: value for name, value in others.items() if value}
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state, **kept}


def _arrays(state: TrainState) -> dict[str, str]:
    """Path -> dtype and shape of everything that is saved."""
    leaves = jax.tree_util.tree_leaves_with_path(_saved(state))
    return {path_of(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
