"""A model and its train state without their numbers: shapes, dtypes and where each would lie."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxpost.models.actor_critic import ActorCritic, as_copy, on_trunk, policy_of, with_adapter
from jaxpost.models.adapters import attach, reference_view
from jaxpost.models.config import Compute, ModelConfig
from jaxpost.models.lora_config import LoraConfig
from jaxpost.models.quant import quantize
from jaxpost.models.transformer import Decoder
from jaxpost.rl.slots import layout
from jaxpost.sharding import HOST, layout_spec, rows_sharding, shardings
from jaxpost.train.reference import Reference
from jaxpost.train.state import on_mesh, placed


def rows_on_mesh(batch: Any, mesh: Mesh) -> Any:
    """Abstract columns of a batch with their places; of arrays or of shapes."""
    place = rows_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), batch)


def abstract_model(
    config: ModelConfig,
    mesh: Mesh,
    *,
    head: str = "lm",
    dtype: str = "float32",
    compute: Compute,
    quantization: str | None = None,
    lora: LoraConfig | None = None,
    critic: str | None = None,
) -> Any:
    """What loading a model of this config would give.

    Args:
        config: of the architecture.
        mesh: where the parameters would lie.
        head, dtype, compute, quantization: as for loading.
        lora: the adapter to train.
        critic: kind of the value model beside it, of VALUE_MODELS.
    """

    def make() -> Any:
        model = Decoder(config, head=head, compute=compute, rngs=nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
        model = model if quantization is None else quantize(model, quantization)
        model = model if lora is None else attach(model, lora)
        return model if critic is None else _with_critic(model, critic, lora)

    graphdef, state = nnx.split(nnx.eval_shape(make))
    nnx.replace_by_pure_dict(state, on_mesh(nnx.to_pure_dict(state), mesh))
    return nnx.merge(graphdef, state)


def _with_critic(model: Decoder, kind: str, lora: LoraConfig | None) -> ActorCritic:
    makers: dict[str, Callable[[], ActorCritic]] = {
        "copy": lambda: as_copy(model),
        "trunk": lambda: on_trunk(model),
        "adapter": lambda: with_adapter(model, lora or LoraConfig(), seed=1),
    }
    return makers[kind]()


def abstract_reference(
    config: ModelConfig, mesh: Mesh, *, dtype: str, compute: Compute, has_adapter: bool
) -> Reference:
    """What the policy is compared with: its base, or a copy."""
    if has_adapter:
        return Reference(lambda model, _: reference_view(policy_of(model)))
    graphdef, state = nnx.split(abstract_model(config, mesh, dtype=dtype, compute=compute))
    return Reference(lambda _, own: nnx.merge(graphdef, own), nnx.to_pure_dict(state))


def at_hand_on_mesh(weights: Any, mesh: Mesh) -> Any:
    """Abstract weights of a generation with their places."""
    return placed(weights, shardings(weights, mesh, gathered=True))


def slots_on_mesh(slots: Any, mesh: Mesh) -> Any:
    """Abstract slots with their places."""
    places = jax.tree.map(lambda leaf: NamedSharding(mesh, layout_spec(layout(leaf), leaf.shape, mesh)), slots)
    return placed(slots, places)


def bytes_per_device(tree: Any) -> int:
    """Of abstract arrays with their places, the bytes of one device; those in the host's memory are not among them."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != HOST]
    return sum(
        jnp.dtype(leaf.dtype).itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in leaves
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )
