"""The step: one pure, donated `jax.jit` from (state, batch) to (state, report)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jaxpost.compilation import as_written
from jaxpost.metrics import Metric, loss_of, over_parts
from jaxpost.objectives.base import Batch, Objective
from jaxpost.objectives.sequences import num_tokens
from jaxpost.sharding import constrain, on_devices
from jaxpost.train.optim import clip_by_global_norm
from jaxpost.train.reference import Reference
from jaxpost.train.spikes import judged
from jaxpost.train.state import TrainState, merge


class StepReport(NamedTuple):
    """What a step tells the loop; arrays that nobody has to wait for.

    Attributes:
        metrics: loss and metrics, not yet divided.
        latest: values of this very step (grad_norm before clipping, learning_rate).
        num_tokens: tokens of the examples in the batch.
        finite: False when loss or gradient were not, and parameters and optimizer were left as they were.
        spike: likewise, because the gradient was far too large.
    """

    metrics: dict[str, Metric]
    latest: dict[str, Array]
    num_tokens: Array
    finite: Array
    spike: Array


def make_step(
    objective: Objective,
    graphdef: Any,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    max_grad_norm: float | None,
    num_micro_batches: int,
    seed: int = 0,
    training: Callable[[Any, Array], Any] = lambda model, key: model,
    follow: Callable[[TrainState], Any] = lambda state: state.reference,
    skip_spikes: float | None = None,
) -> Any:
    """Compile-ready train step: (state, batch) -> (state, StepReport).

    The result does not depend on how a batch is split into micro-batches, but for what is random.

    Args:
        objective: the method.
        graphdef: of the model, from `create_state`.
        state: what the step will be called with; it leaves every array where it found it.
        optimizer: Optax transformation without clipping.
        schedule: learning rate of each step, for the report.
        max_grad_norm: global-norm clipping; None or 0 for none.
        num_micro_batches: gradient accumulation steps; must divide the rows of each device.
        seed: of the run.
        training: the model as it trains, with what is random about that drawn from the key of a micro-batch.
        follow: the reference's arrays after a step.
        skip_spikes: as of `SpikeConfig`; the state then has norms.
    """

    def total_loss(params: Any, frozen: Any, micro: Batch, key: Array) -> tuple[Array, dict[str, Metric]]:
        loss, metrics = objective.loss(training(merge(graphdef, params, frozen), key), micro)
        return loss.total, {"loss": loss, **metrics}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), num_micro_batches)
        grads, metrics = _mean_gradient(total_loss, state, split_batch(batch, num_micro_batches), keys)
        grads, norm = clip_by_global_norm(grads, max_grad_norm)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss_of(metrics).total)
        held = on_devices(state.opt_state)
        updates, opt_state = optimizer.update(grads, held, state.params)
        updates = objective.taken(updates, batch, state.step)

        spike, norms = judged(state.norms, norm, finite, skip_spikes)
        learned = {name: batch[name][0] for name in state.memory}
        new = optax.apply_updates(state.params, updates), opt_state, learned
        old = state.params, held, state.memory
        kept = jax.tree.map(lambda new, old: jnp.where(finite & ~spike, new, old), new, old)
        params, opt_state, memory = kept
        new_state = TrainState(state.step + 1, params, state.frozen, opt_state, state.reference, memory, norms)
        new_state = dataclasses.replace(new_state, reference=follow(new_state))
        latest = {"grad_norm": norm, "learning_rate": jnp.asarray(schedule(updates_done(state)), jnp.float32)}
        return new_state, StepReport(metrics, latest, num_tokens(batch), finite, spike)

    # Without this the compiler picks the layout of the new state, and the second step compiles again.
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(layout, None), compiler_options=as_written())


def _mean_gradient(
    total_loss: Callable[..., tuple[Array, dict[str, Metric]]], state: TrainState, micros: Batch, keys: Array
) -> tuple[Any, dict[str, Metric]]:
    """The gradients of the micro-batches' totals, summed and divided once by the summed count; and the metrics."""
    gradient = jax.grad(total_loss, has_aux=True)

    def accumulate(grads: Any, part: tuple[Batch, Array]) -> tuple[Any, dict[str, Metric]]:
        new, metrics = gradient(state.params, state.frozen, *part)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, new), metrics

    if len(keys) == 1:  # nothing to add up, which would take another copy of the gradients
        grads, metrics = gradient(state.params, state.frozen, *jax.tree.map(lambda x: x[0], (micros, keys)))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    else:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
        grads, stacked = lax.scan(accumulate, zeros, (micros, keys))
        metrics = over_parts(stacked)
    count = jnp.maximum(loss_of(metrics).count, 1)
    return jax.tree.map(lambda g: g / count, grads), metrics


class Programs:
    """A step, compiled before it is needed for each shape of batch that will come; never again after that."""

    def __init__(self, step: Any):
        self.step = step
        self.by_shape: dict[Any, Any] = {}

    def prepare(self, state: TrainState, batch: Batch) -> None:
        """Compile for batches of this shape; nothing is run."""
        self.by_shape[_shapes(batch)] = self.step.lower(state, batch).compile()

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        """Run the step; a shape that was not prepared is compiled now."""
        return self.by_shape.get(_shapes(batch), self.step)(state, batch)


def _shapes(batch: Batch) -> Any:
    return tuple((name, column.shape) for name, column in sorted(batch.items()))


def updates_done(state: TrainState) -> Array:
    """What the optimizer's schedule counts: steps that were not skipped."""
    counts = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
    return counts[0][1] if counts else state.step


def make_annotate(
    objective: Objective,
    graphdef: Any,
    reference: Reference | None = None,
    *,
    num_parts: int = 1,
    learns: bool = True,
) -> Callable[[TrainState, Batch], Batch]:
    """Compile-ready annotation of a whole batch with the columns that need no gradient.

    Args:
        objective: the method.
        graphdef: of the model, from `create_state`.
        reference: None where the method needs none. Where it changes, its arrays are those of the state.
        num_parts: the rows of a batch are read in so many parts.
        learns: whether what the objective remembers takes in the batch.
    """

    def annotate(params: Any, frozen: Any, arrays: Any, memory: dict[str, Array], batch: Batch) -> Batch:
        policy = merge(graphdef, params, frozen)
        compared = None if reference is None else InParts(reference.build(policy, arrays), num_parts)
        annotated = objective.annotate(InParts(policy, num_parts), compared, remembered(batch, memory))
        return annotated if learns else remembered(annotated, memory)

    compiled, fixed = jax.jit(annotate), None if reference is None else reference.arrays

    def annotated(state: TrainState, batch: Batch) -> Batch:
        arrays = fixed if state.reference is None else state.reference
        return compiled(state.params, state.frozen, arrays, state.memory, batch)

    return annotated


def remembered(batch: Batch, memory: dict[str, Array]) -> Batch:
    """The batch with what the objective remembers, a column [B] each."""
    return batch | {name: jnp.full(len(batch["tokens"]), value) for name, value in memory.items()}


class InParts:
    """A model that reads its rows a part after the other, so that a whole batch takes the memory of a part."""

    def __init__(self, model: Any, num_parts: int):
        self.model, self.num_parts = model, num_parts
        self.unembed, self.unembedding, self.score = model.unembed, model.unembedding, model.score

    def hidden(self, tokens: Array, positions: Array, segments: Array) -> tuple[Array, Array]:
        """As the model's; the load-balancing loss is the mean over the parts."""
        parts = split_batch({"tokens": tokens, "positions": positions, "segments": segments}, self.num_parts)
        h, balance = lax.map(lambda part: self.model.hidden(**part), parts)
        return h.swapaxes(0, 1).reshape(*tokens.shape, -1), jnp.mean(balance)

    def values(self, h: Array, tokens: Array, positions: Array, segments: Array) -> tuple[Array, Array]:
        """As the model's, of one that has a critic."""
        parts = split_batch({"h": h, "tokens": tokens, "positions": positions, "segments": segments}, self.num_parts)
        values, balance = lax.map(lambda part: self.model.values(**part), parts)
        return values.swapaxes(0, 1).reshape(tokens.shape), jnp.mean(balance)


def split_batch(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B / parts, ...]; every device splits its own rows, so nothing moves between devices."""

    def split(column: Array) -> Array:
        rows = column.reshape(column.shape[0] // parts, parts, *column.shape[1:]).swapaxes(0, 1)
        return constrain(rows, None, "batch", *[None] * (rows.ndim - 2))

    return jax.tree.map(split, batch)
