"""A sparse mixture of experts in the MLP's place (Shazeer et al., 2017, arXiv:1701.06538)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from jaxpost.models.config import Experts, ModelConfig
from jaxpost.models.grouped import grouped_product
from jaxpost.models.layers import ACTIVATIONS, MLP, Linear
from jaxpost.models.lora import LoRA
from jaxpost.models.quant import Kernel, with_dense
from jaxpost.sharding import mesh_axes

Factors = tuple[tuple[Array, ...], ...]  # of the adapters of gate, up and down, each empty without one


class Routing(NamedTuple):
    """Where a layer's router sent its tokens.

    Attributes:
        probabilities: of each expert, before only the best were kept.
        chosen: the experts that each token visits.
    """

    probabilities: Float[Array, "rows E"]
    chosen: Int[Array, "rows k"]


class ExpertLinear(nnx.Module):
    """One kernel [in, out] an expert: [E, in, out]."""

    def __init__(self, num_experts: int, in_dim: int, out_dim: int, *, rngs: nnx.Rngs):
        self.kernel: Kernel = nnx.Param(jax.random.normal(rngs.params(), (num_experts, in_dim, out_dim)) * 0.02)
        self.adapter: LoRA | None = nnx.data(None)

    def factors(self, dtype: Any) -> tuple[Array, ...]:
        """The adapter's [E, in, R] and [E, R, out]; nothing without one."""
        return () if self.adapter is None else tuple(factor.astype(dtype) for factor in self.adapter.factors())


class ExpertMLPs(nnx.Module):
    """The gated MLPs of E experts."""

    def __init__(self, experts: Experts, dim: int, *, rngs: nnx.Rngs):
        self.gate = ExpertLinear(experts.num_experts, dim, experts.mlp_dim, rngs=rngs)
        self.up = ExpertLinear(experts.num_experts, dim, experts.mlp_dim, rngs=rngs)
        self.down = ExpertLinear(experts.num_experts, experts.mlp_dim, dim, rngs=rngs)


class MoE(nnx.Module):
    """Each token visits its most probable experts; their outputs are added up, weighted by those probabilities."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        assert config.experts is not None
        self.config, self.activation = config.experts, config.activation
        self.router = Linear(config.embed_dim, config.experts.num_experts, rngs=rngs)
        self.experts = ExpertMLPs(config.experts, config.embed_dim, rngs=rngs)
        shared = config.experts.shared_mlp_dim
        self.shared = MLP(config.embed_dim, shared, activation=config.activation, rngs=rngs) if shared else None
        self.shared_share = Linear(config.embed_dim, 1, rngs=rngs) if shared else None

    def __call__(self, x: Float[Array, "rows D"]) -> tuple[Float[Array, "rows D"], Routing]:
        probabilities = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.config.num_per_token)
        if self.config.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        parts = self.experts.gate, self.experts.up, self.experts.down
        factors = tuple(part.factors(x.dtype) for part in parts)
        visit = partial(_on_each_device, self.activation, weights.astype(x.dtype), chosen, factors)
        out = with_dense(visit, x, *(part.kernel for part in parts))
        if self.shared is not None and self.shared_share is not None:
            out = out + jax.nn.sigmoid(self.shared_share(x)) * self.shared(x)
        return out, Routing(probabilities, chosen)


def balance_terms(routing: Routing, real: Bool[Array, "rows"]) -> tuple[Float[Array, "E"], Float[Array, "E"]]:
    """Sums over the real tokens of a layer: visits to each expert, and probability of each."""
    visits = jax.nn.one_hot(routing.chosen, routing.probabilities.shape[-1]).sum(axis=1)
    return real.astype(jnp.float32) @ visits, real.astype(jnp.float32) @ routing.probabilities


def balance_loss(
    visits: Float[Array, "layers E"], mass: Float[Array, "layers E"], num_tokens: Int[Array, ""]
) -> Float[Array, ""]:
    """E sum_e (visits to e) / n * (probability of e) / n; n counts the tokens of all layers, as in transformers.

    Fedus et al., 2021, "Switch Transformers", arXiv:2101.03961, equations 4 to 6.
    """
    layers, num_experts = visits.shape
    total = jnp.maximum(num_tokens, 1) * layers
    return num_experts * jnp.sum(visits.sum(axis=0) / total * (mass.sum(axis=0) / total))


def _on_each_device(
    activation: str, weights: Array, chosen: Array, factors: Factors, x: Array, *kernels: Array
) -> Array:
    """`_visit_experts` on a mesh: each group of devices sorts its own tokens, and each device visits its own experts.

    Along the axis `expert`, which splits both, tokens go to where their experts are: all of them to all devices of the
    axis (all-gather), which add up their parts of each token where it came from (reduce-scatter). Of an axis of size n
    a device is sent n - 1 times its own tokens, and sends as much back; sent to the visited experts alone, it were
    k (n - 1) / n times, which is less where n is above k. In turn there is room for any choice: no token is dropped.
    Where the axis does not divide the experts or the tokens, every device has all of these.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _visit_experts(activation, x, weights, chosen, factors, *kernels)
    num_experts, _, mlp_dim = kernels[0].shape
    rows, expert = mesh_axes("tokens", len(x), mesh), mesh_axes("experts", num_experts, mesh)
    tensor = mesh_axes("mlp", mlp_dim, mesh)
    moves = tuple(axis for axis in expert if axis in rows)
    summed = tensor + tuple(axis for axis in expert if axis not in rows)

    def visit(x: Array, weights: Array, chosen: Array, factors: Factors, *kernels: Array) -> Array:
        x, weights, chosen = (jax.lax.all_gather(part, moves, tiled=True) for part in (x, weights, chosen))
        first = jax.lax.axis_index(expert) * len(kernels[0])
        out = _visit_experts(activation, x, weights, chosen - first, factors, *kernels)
        return jax.lax.psum(jax.lax.psum_scatter(out, moves, tiled=True), summed)

    tokens, whole, wide, tall = P(rows), P(expert), P(expert, None, tensor), P(expert, tensor)
    by_part = (whole, wide), (whole, wide), (tall, whole)
    thin = tuple(specs[: len(part)] for specs, part in zip(by_part, factors, strict=True))
    specs: Any = (tokens, tokens, tokens, thin, wide, wide, tall)
    return jax.shard_map(visit, in_specs=specs, out_specs=tokens, check_vma=False)(
        x, weights, chosen, factors, *kernels
    )


def _visit_experts(
    activation: str,
    x: Float[Array, "rows D"],
    weights: Float[Array, "rows k"],
    chosen: Int[Array, "rows k"],
    factors: Factors,
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "rows D"]:
    """Sort the visits by expert, so that each expert's are one matrix product; no token is dropped.

    Experts that `chosen` names beyond the E here are others' to visit: they add nothing, and come last in the order.
    """
    num_experts, num_per_token = len(gate), chosen.shape[1]
    chosen = jnp.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts).reshape(-1)
    # A token visits an expert once at most.
    order = jnp.argsort(chosen, stable=True)[: len(x) * min(num_per_token, num_experts)]
    token, ours = order // num_per_token, (chosen[order] < num_experts)[:, None]
    visit = partial(grouped_product, sizes=jnp.bincount(chosen, length=num_experts))

    def apply(rows: Array, kernel: Array, thin: tuple[Array, ...]) -> Array:
        y = visit(rows, kernel)
        return y + visit(visit(rows, thin[0]), thin[1]) if thin else y

    # What a product of groups says of rows outside of them is not promised, nor is their gradient.
    visitors = jnp.where(ours, x[token], 0)
    hidden = ACTIVATIONS[activation](apply(visitors, gate, factors[0])) * apply(visitors, up, factors[1])
    out = jnp.where(ours, apply(hidden, down, factors[2]), 0)
    return jnp.zeros_like(x).at[token].add(out * weights.reshape(-1)[order][:, None])
