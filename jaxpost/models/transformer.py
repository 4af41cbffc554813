"""The decoder: embedding, scanned blocks, final norm, head.

`hidden` and `unembed` are the contract with objectives. `prefill` and `decode` walk the same weights with a cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from jaxpost.models.attention import RESIDUALS, Places, attend_cache, attention
from jaxpost.models.config import Compute, ModelConfig
from jaxpost.models.layers import MLP, Embed, Head, Linear, RMSNorm, apply_rotary, rotary_frequencies, rotary_table
from jaxpost.sharding import constrain

REMAT = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RESIDUALS),
    ),
    "full": None,
}


class Cache(NamedTuple):
    """Keys and values of every layer; slot s of a row holds position s.

    Attributes:
        keys, values: one [B, S, K, d] array a layer: updating one never copies another.
        lengths: [B] number of filled slots.
    """

    keys: tuple[Float[Array, "B S K d"], ...]
    values: tuple[Float[Array, "B S K d"], ...]
    lengths: Int[Array, "B"]


class Attention(nnx.Module):
    """Projections of grouped-query attention; the kernel itself is called by the block."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        heads, kv_heads, bias = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
            config.attention_bias,
        )
        self.query = Linear(config.embed_dim, heads, bias=bias, rngs=rngs)
        self.key = Linear(config.embed_dim, kv_heads, bias=bias, rngs=rngs)
        self.value = Linear(config.embed_dim, kv_heads, bias=bias, rngs=rngs)
        self.out = Linear(heads, config.embed_dim, bias=bias, rngs=rngs)

    def project(self, x: Float[Array, "rows D"], rotary: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Queries [rows, H, d], keys and values [rows, K, d], rotated."""
        query, key, value = (
            linear(x).reshape(len(x), -1, self.head_dim) for linear in (self.query, self.key, self.value)
        )
        return apply_rotary(query, *rotary), apply_rotary(key, *rotary), value


class Block(nnx.Module):
    """Pre-norm transformer block; the rows are the tokens of all examples, since only attention knows of examples."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def project(self, h: Float[Array, "rows D"], rotary: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        return self.attention.project(self.attention_norm(h), rotary)

    def finish(self, h: Float[Array, "rows D"], attended: Float[Array, "rows H d"]) -> Float[Array, "rows D"]:
        h = h + self.attention.out(attended.reshape(len(h), -1))
        return h + self.mlp(self.mlp_norm(h))


class Decoder(nnx.Module):
    """A decoder-only language model with a language-model head."""

    def __init__(self, config: ModelConfig, *, compute: Compute = Compute(), rngs: nnx.Rngs):
        self.config = config
        self.compute = compute
        self.embed = Embed(config.vocab_size, config.embed_dim, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else Head(config.embed_dim, config.vocab_size, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        positions: Int[Array | np.ndarray, "B T"] | None = None,
        segments: Int[Array | np.ndarray, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits, float32. Positions default to 0..T-1 and segments to one document a row."""
        tokens = jnp.asarray(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = jnp.ones_like(tokens) if segments is None else segments
        return self.unembed(self.hidden(tokens, jnp.asarray(positions), jnp.asarray(segments)))

    def hidden(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Final hidden states; documents of different `segments` never see each other."""
        return self._walk(tokens, positions, segments, with_cache=False)[0]

    def unembed(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Logits of hidden states, float32."""
        return self.embed.attend(h) if self.head is None else self.head(h)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], cache_length: int
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Read right-padded prompts: each row's last hidden state, and a cache with room for `cache_length` tokens."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        h, (keys, values) = self._walk(tokens, positions, segments, with_cache=True)
        room = [(0, 0), (0, cache_length - tokens.shape[1]), (0, 0), (0, 0)]
        keys, values = (tuple(jnp.pad(layer, room) for layer in stacked) for stacked in (keys, values))
        last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return last, Cache(keys, values, lengths)

    def decode(self, tokens: Int[Array, "B"], cache: Cache) -> tuple[Float[Array, "B D"], Cache]:
        """One more token a row: its hidden state, and the cache with it appended.

        Layers are unrolled with a cache each: scanning them with the cache copies all of it at every token.
        """
        rotary = rotary_table(cache.lengths, rotary_frequencies(self.config.rotary, self.config.head_dim))
        rows = jnp.arange(len(tokens))
        graphdef, stacked = nnx.split(self.layers)
        h = self.embed(tokens, self.compute.dtype)
        keys, values = [], []
        for index in range(self.config.num_layers):
            block = nnx.merge(graphdef, jax.tree.map(lambda weight, index=index: weight[index], stacked))
            query, key, value = block.project(h, rotary)
            keys.append(cache.keys[index].at[rows, cache.lengths].set(key))
            values.append(cache.values[index].at[rows, cache.lengths].set(value))
            attended = attend_cache(
                query, keys[index], values[index], cache.lengths + 1, scale=self.config.head_dim**-0.5
            )
            h = block.finish(h, attended)
        return self.norm(h), Cache(tuple(keys), tuple(values), cache.lengths + 1)

    def _walk(self, tokens: Array, positions: Array, segments: Array, *, with_cache: bool) -> tuple[Array, tuple]:
        """Scan the blocks; with_cache also stacks every layer's keys and values."""
        places, shape = Places(positions, segments), tokens.shape
        rotary = rotary_table(positions.reshape(-1), rotary_frequencies(self.config.rotary, self.config.head_dim))
        graphdef, stacked = nnx.split(self.layers)

        def body(h: Array, weights: nnx.State) -> tuple[Array, tuple]:
            block = nnx.merge(graphdef, weights)
            query, key, value = (x.reshape(*shape, *x.shape[1:]) for x in block.project(h, rotary))
            scale, kernel = self.config.head_dim**-0.5, self.compute.attention
            attended = attention(query, key, value, places, scale=scale, kernel=kernel)
            h = constrain(block.finish(h, attended.reshape(-1, *attended.shape[2:])), "batch", None)
            return h, (key, value) if with_cache else ()

        if self.compute.remat != "none":
            body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[self.compute.remat])
        h = constrain(self.embed(tokens.reshape(-1), self.compute.dtype), "batch", None)
        h, cached = jax.lax.scan(body, h, stacked)
        return self.norm(h).reshape(*shape, -1), cached
