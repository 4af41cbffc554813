"""The parts of a decoder block: linear, norm, embedding, head, gated MLP."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from jaxpost.models.lora import Adapter, project
from jaxpost.models.quant import Kernel, with_dense

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`; the kernel is [in, out], perhaps in few bits, and cast to the dtype of `x`."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.kernel: Kernel = nnx.Param(jax.random.normal(rngs.params(), (in_dim, out_dim)) * 0.02)
        self.bias = nnx.Param(jnp.zeros(out_dim)) if bias else None
        self.adapter: Adapter | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        y = with_dense(partial(project, self.adapter), x, self.kernel)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 (Zhang and Sennrich, 2019, arXiv:1910.07467).

    `offset` is added to the stored scale: Gemma's are stored less one.
    """

    def __init__(self, dim: int, *, eps: float, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full(dim, 1 - offset, jnp.float32))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * (self.scale[...].astype(jnp.float32) + self.offset)).astype(x.dtype)


class Embed(nnx.Module):
    """Token embedding [V, D]; `attend` multiplies with its transpose, for tied heads, which have their own adapter."""

    def __init__(self, vocab_size: int, dim: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, dim)) * 0.02)
        self.adapter: Adapter | None = nnx.data(None)
        self.head_adapter: Adapter | None = nnx.data(None)

    def __call__(self, tokens: Int[Array, "rows"], dtype: str) -> Float[Array, "rows D"]:
        # An id outside of the table becomes NaN rather than a neighbour's row: see `data` for the check with a name.
        if self.adapter is not None:
            return self.adapter.lookup(tokens, self.embedding[...], dtype)
        return jnp.take(self.embedding[...], tokens, axis=0).astype(dtype)

    def attend(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        return project(self.head_adapter, h, self.embedding[...].astype(h.dtype), jnp.float32, turned=True)


class Head(nnx.Module):
    """Output projection [D, V]; logits are float32 whatever the inputs."""

    def __init__(self, dim: int, vocab_size: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (dim, vocab_size)) * 0.02)
        self.adapter: Adapter | None = nnx.data(None)

    def __call__(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        return project(self.adapter, h, self.kernel[...].astype(h.dtype), jnp.float32)


class MLP(nnx.Module):
    """Gated feed-forward layer: down(act(gate(x)) * up(x)) (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, mlp_dim: int, *, activation: str, bias: bool = False, rngs: nnx.Rngs):
        self.gate = Linear(dim, mlp_dim, bias=bias, rngs=rngs)
        self.up = Linear(dim, mlp_dim, bias=bias, rngs=rngs)
        self.down = Linear(mlp_dim, dim, bias=bias, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "rows D"]) -> Float[Array, "rows D"]:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
