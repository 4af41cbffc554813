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
from jaxpost.models.layers import ACTIVATIONS, MLP, Linear
from jaxpost.models.lora import LoRA
from jaxpost.models.quant import Kernel, with_dense
from jaxpost.sharding import BATCH_AXES, batch_groups

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
    """`_visit_experts`, with each group of devices sorting its own tokens, so that none move between devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(x) % batch_groups(mesh):
        return _visit_experts(activation, x, weights, chosen, factors, *kernels)
    split = kernels[0].shape[-1] % mesh.shape["tensor"] == 0
    tensor = "tensor" if split else None

    def visit(*arrays: Any) -> Array:
        out = _visit_experts(activation, *arrays)
        return jax.lax.psum(out, "tensor") if split else out

    rows, wide, tall = P(BATCH_AXES), P(None, None, tensor), P(None, tensor)
    thin = tuple(spec[: len(part)] for spec, part in zip([(P(), wide), (P(), wide), (tall, P())], factors, strict=True))
    specs: Any = (rows, rows, rows, thin, wide, wide, tall)
    return jax.shard_map(visit, in_specs=specs, out_specs=rows, check_vma=False)(x, weights, chosen, factors, *kernels)


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
    """Sort the visits by expert, so that each expert's are one matrix product; no token is dropped."""
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    token = order // chosen.shape[1]
    visit = partial(jax.lax.ragged_dot, group_sizes=jnp.bincount(chosen.reshape(-1), length=len(gate)))

    def apply(rows: Array, kernel: Array, thin: tuple[Array, ...]) -> Array:
        y = visit(rows, kernel)
        return y + visit(visit(rows, thin[0]), thin[1]) if thin else y

    visitors = x[token]
    hidden = ACTIVATIONS[activation](apply(visitors, gate, factors[0])) * apply(visitors, up, factors[1])
    out = apply(hidden, down, factors[2])
    return jnp.zeros_like(x).at[token].add(out * weights.reshape(-1)[order][:, None])
