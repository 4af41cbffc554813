"""`TrainState`: the only thing that goes round."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from jaxpost.sharding import HOST, path_of, shardings

# Matrices in their last two dimensions; in front of these, whatever they are stacked by.
DECAYED = (".kernel", ".embedding", ".lora_a", ".lora_b")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes; donated to it, so an old state is dead after the step.

    Attributes:
        step: number of optimizer steps done, which is also the position in the data.
        params: trainable parameters, a nested dict of arrays.
        frozen: the model's other arrays; passed through untouched.
        opt_state: Optax's state for `params`.
        reference: arrays of the model that the policy is compared with, where they change.
        memory: what the objective remembers, float32 scalars by name.
        norms: what is known of the gradients so far, likewise; empty where nobody asks.
    """

    step: Int[Array, ""]
    params: Any
    frozen: Any
    opt_state: Any
    reference: Any = None
    memory: dict[str, Array] = field(default_factory=dict)
    norms: dict[str, Array] = field(default_factory=dict)


def decay_mask(params: Any) -> Any:
    """True for matrices, where weight decay applies; False for biases and norm scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_of(path).endswith(DECAYED), params)


def create_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    trainable: Any,
    mesh: Mesh,
    remembers: Iterable[str] = (),
    *,
    offload_optimizer: bool = False,
) -> tuple[Any, TrainState]:
    """Split a model once, for good.

    Args:
        model: its arrays become part of the state, and are donated with it.
        optimizer: initialised here; its state is laid out like the parameters.
        trainable: an nnx filter, e.g. `nnx.Param`: which Variables get gradients.
        mesh: where the optimizer state goes.
        remembers: that of the objective.
        offload_optimizer: keep the optimizer state in the host's memory.

    Returns:
        (graphdef, state); `merge(graphdef, state.params, state.frozen)` is the model.
    """
    graphdef, params, frozen = _parted(model, trainable)
    layout = _optimizer_layout(jax.eval_shape(optimizer.init, params), mesh, offload_optimizer)
    opt_state = jax.jit(optimizer.init, out_shardings=layout)(params)
    numbers = _numbers(remembers)
    numbers = jax.device_put(numbers, shardings(numbers, mesh))
    return graphdef, TrainState(numbers.pop("step"), params, frozen, opt_state, memory=numbers)


def abstract_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    trainable: Any,
    mesh: Mesh,
    remembers: Iterable[str] = (),
    *,
    offload_optimizer: bool = False,
) -> tuple[Any, TrainState]:
    """As `create_state`, of a model without its numbers: shapes, dtypes and places."""
    graphdef, params, frozen = _parted(model, trainable)
    opt_state = jax.eval_shape(optimizer.init, params)
    opt_state = placed(opt_state, _optimizer_layout(opt_state, mesh, offload_optimizer))
    numbers = on_mesh(jax.eval_shape(lambda: _numbers(remembers)), mesh)
    return graphdef, TrainState(numbers.pop("step"), params, frozen, opt_state, memory=numbers)


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Abstract parameters, or what is laid out like them, with their places."""
    return placed(tree, shardings(tree, mesh))


def placed(tree: Any, layout: Any) -> Any:
    """Abstract arrays with these shardings."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, layout)


def _optimizer_layout(opt_state: Any, mesh: Mesh, offload: bool) -> Any:
    """Where the optimizer state is; single numbers, and bytes, which XLA for TPU cannot fetch, stay on the devices."""

    def place(leaf: Any, sharding: NamedSharding) -> NamedSharding:
        moves = offload and leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.floating)
        return sharding.with_memory_kind(HOST) if moves else sharding

    return jax.tree.map(place, opt_state, shardings(opt_state, mesh))


def _numbers(remembers: Iterable[str]) -> dict[str, Array]:
    """The step and what the objective remembers, before the first step."""
    return {"step": jnp.zeros((), jnp.int32), **{name: jnp.zeros(()) for name in remembers}}


def snapshot(model: nnx.Module, trainable: Any, memory: dict[str, Array]) -> tuple[Any, TrainState]:
    """(graphdef, state) of a model as it is, to evaluate; its arrays stay its own."""
    graphdef, params, frozen = _parted(model, trainable)
    return graphdef, TrainState(jnp.int32(0), params, frozen, None, memory=memory)


def _parted(model: nnx.Module, trainable: Any) -> tuple[Any, Any, Any]:
    """(graphdef, trainable arrays, all others) of a model."""
    graphdef, params, frozen = nnx.split(model, trainable, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)


def merge(graphdef: Any, params: Any, frozen: Any) -> Any:
    """The model made of these arrays."""
    return nnx.merge(graphdef, params, frozen) if frozen else nnx.merge(graphdef, params)
