"""The parts of a decoder block: linear, norm, embedding, gated MLP, rotary embedding."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from jaxpost.models.config import ModelConfig, Rotary

ACTIVATIONS = {"silu": jax.nn.silu}


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`; the kernel is [in, out], cast to the dtype of `x`."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (in_dim, out_dim)) * 0.02)
        self.bias = nnx.Param(jnp.zeros(out_dim)) if bias else None

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


class Embed(nnx.Module):
    """Token embedding [V, D]; `attend` multiplies with its transpose, for tied heads."""

    def __init__(self, vocab_size: int, dim: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, dim)) * 0.02)

    def __call__(self, tokens: Int[Array, "rows"], dtype: str) -> Float[Array, "rows D"]:
        # An id outside of the table becomes NaN rather than a neighbour's row: see `data` for the check with a name.
        return jnp.take(self.embedding[...], tokens, axis=0).astype(dtype)

    def attend(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        return jnp.matmul(h, self.embedding[...].astype(h.dtype).T, preferred_element_type=jnp.float32)


class Head(nnx.Module):
    """Output projection [D, V]; logits are float32 whatever the inputs."""

    def __init__(self, dim: int, vocab_size: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (dim, vocab_size)) * 0.02)

    def __call__(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        return jnp.matmul(h, self.kernel[...].astype(h.dtype), preferred_element_type=jnp.float32)


class MLP(nnx.Module):
    """Gated feed-forward layer: down(act(gate(x)) * up(x)) (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.gate = Linear(config.embed_dim, config.mlp_dim, bias=config.mlp_bias, rngs=rngs)
        self.up = Linear(config.embed_dim, config.mlp_dim, bias=config.mlp_bias, rngs=rngs)
        self.down = Linear(config.mlp_dim, config.embed_dim, bias=config.mlp_bias, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "rows D"]) -> Float[Array, "rows D"]:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


def rotary_frequencies(rotary: Rotary, head_dim: int) -> Float[np.ndarray, "half"]:
    """Radians per position of each of the head_dim / 2 pairs, float32 (Su et al., 2021, arXiv:2104.09864)."""
    frequencies = 1.0 / rotary.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if rotary.kind == "linear":
        frequencies = frequencies / rotary.factor
    if rotary.kind == "llama3":
        # Grattafiori et al., 2024, "The Llama 3 Herd of Models", arXiv:2407.21783; the rule is in their released code.
        turns = rotary.original_max_positions * frequencies / (2 * np.pi)
        share = (turns - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
        share = np.clip(share, 0.0, 1.0)
        frequencies = frequencies * (share + (1 - share) / rotary.factor)
    return frequencies.astype(np.float32)


def rotary_table(
    positions: Int[Array, "rows"], frequencies: Float[np.ndarray, "half"]
) -> tuple[Float[Array, "rows half"], Float[Array, "rows half"]]:
    """Cosine and sine of every angle; once per forward pass, shared by all layers."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(
    x: Float[Array, "rows heads d"], cos: Float[Array, "rows half"], sin: Float[Array, "rows half"]
) -> Float[Array, "rows heads d"]:
    """Turn the pairs (x[i], x[i + d/2]) by their angles, as HF does."""
    cos, sin = cos[:, None].astype(x.dtype), sin[:, None].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
