"""The decoder: embedding, scanned blocks, final norm, head.

`hidden`, `unembed` and `score` are the contract with objectives. `prefill` and `decode` walk the same weights with a
cache. What differs from layer to layer is data: the window, and which of the rotary embeddings.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from jaxpost.models.at_hand import at_hand
from jaxpost.models.attention import attention
from jaxpost.models.cache import Cache
from jaxpost.models.config import Compute, ModelConfig
from jaxpost.models.context import to_heads, to_tokens
from jaxpost.models.layers import MLP, Embed, Head, Linear, RMSNorm
from jaxpost.models.lora import Adapters
from jaxpost.models.moe import MoE, Routing, balance_loss, balance_terms
from jaxpost.models.remat import named_input, rematerialised
from jaxpost.models.rotary import apply_rotary, rotary_angles, text_lengths
from jaxpost.models.views import Places
from jaxpost.sharding import constrain

HEADS = ("lm", "reward")


class Layer(NamedTuple):
    """What makes one layer differ from another, as data; None where all layers are alike.

    Attributes:
        rotary: which of the rotary embeddings.
        window: tokens that it sees.
    """

    rotary: Int[Array, "..."] | None
    window: Int[Array, "..."] | None


class Attention(nnx.Module):
    """Projections of grouped-query attention; the kernel itself is called by the decoder."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        bias = "qkv" in config.biases
        self.query = Linear(config.embed_dim, heads, bias=bias, rngs=rngs)
        self.key = Linear(config.embed_dim, kv_heads, bias=bias, rngs=rngs)
        self.value = Linear(config.embed_dim, kv_heads, bias=bias, rngs=rngs)
        self.out = Linear(heads, config.embed_dim, bias="out" in config.biases, rngs=rngs)
        if config.qk_norm != "none":
            dims = (heads, kv_heads) if config.qk_norm == "projection" else (config.head_dim, config.head_dim)
            self.query_norm, self.key_norm = (RMSNorm(d, eps=config.norm_eps, offset=config.norm_offset) for d in dims)

    def project(self, x: Float[Array, "rows D"], cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Queries [rows, H, d], keys and values [rows, K, d], rotated."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.qk_norm == "projection":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (part.reshape(len(x), -1, self.head_dim) for part in (query, key, value))
        if self.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value


class Block(nnx.Module):
    """Transformer block; the rows are the tokens of all examples, since only attention knows of examples."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config

        def norm(place: str) -> RMSNorm | None:
            wanted = config.norms in (place, "both")
            return RMSNorm(config.embed_dim, eps=config.norm_eps, offset=config.norm_offset) if wanted else None

        self.attention_norm, self.mlp_norm = norm("pre"), norm("pre")
        self.post_attention_norm, self.post_mlp_norm = norm("post"), norm("post")
        self.attention = Attention(config, rngs=rngs)
        bias = "mlp" in config.biases
        self.mlp = (
            MoE(config, rngs=rngs)
            if config.experts
            else MLP(config.embed_dim, config.mlp_dim, activation=config.activation, bias=bias, rngs=rngs)
        )

    def project(self, h: Float[Array, "rows D"], cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values of the tokens."""
        return self.attention.project(_normed(h, self.attention_norm), cos, sin)

    def finish(
        self, h: Float[Array, "rows D"], attended: Float[Array, "rows H d"]
    ) -> tuple[Float[Array, "rows D"], Routing | None]:
        """The residual stream after this block, and what its router did if it has one."""
        scale = self.config.residual_scale
        h = h + scale * _normed(self.attention.out(attended.reshape(len(h), -1)), self.post_attention_norm)
        out = self.mlp(_normed(h, self.mlp_norm))
        out, routing = out if isinstance(out, tuple) else (out, None)
        return h + scale * _normed(out, self.post_mlp_norm), routing


def _logits(config: ModelConfig, graphdef: Any, weights: Any, h: Array) -> Array:
    """What the embedding, or the head, makes of hidden states."""
    module = nnx.merge(graphdef, weights)
    logits = module.attend(h) if isinstance(module, Embed) else module(h)
    if config.logit_divisor != 1:
        logits = logits / config.logit_divisor
    cap = config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _normed(x: Array, norm: RMSNorm | None) -> Array:
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """A decoder-only language model, with the head of a language model or of a reward model."""

    def __init__(self, config: ModelConfig, *, head: str = "lm", compute: Compute = Compute(), rngs: nnx.Rngs):
        self.config = config
        self.compute = compute
        self.head_kind = head
        self.embed = Embed(config.vocab_size, config.embed_dim, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(config.embed_dim, eps=config.norm_eps, offset=config.norm_offset)
        tied = config.tie_embeddings and head == "lm"
        self.head = None if tied else Head(config.embed_dim, 1 if head == "reward" else config.vocab_size, rngs=rngs)
        self.adapters: Adapters | None = nnx.data(None)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        positions: Int[Array | np.ndarray, "B T"] | None = None,
        segments: Int[Array | np.ndarray, "B T"] | None = None,
    ) -> Float[Array, "B T V"] | Float[Array, "B T"]:
        """Logits [B, T, V], or scores [B, T] of a reward model; float32.

        Positions default to 0..T-1 and segments to one document a row.
        """
        tokens = jnp.asarray(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = jnp.ones_like(tokens) if segments is None else segments
        h, _ = self.hidden(tokens, jnp.asarray(positions), jnp.asarray(segments))
        return self.unembed(h) if self.head_kind == "lm" else self.score(h)

    def hidden(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """Final hidden states, and the load-balancing loss of the routers (0 without experts).

        Documents of different `segments` never see each other; where a document may branch, `models.attention` says.
        """
        lengths = text_lengths(positions, segments).reshape(-1) if self.config.turns_by_length else 0
        h, _, balance = self._walk(tokens, positions, segments, lengths, with_cache=False)
        return h, balance

    def unembed(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Logits of hidden states, float32."""
        return self.unembedding()(h)

    def unembedding(self) -> jax.tree_util.Partial:
        """`unembed` as a function that is a tree, whose leaves are the arrays that it needs."""
        assert self.head_kind == "lm"
        graphdef, weights = nnx.split(self.embed if self.head is None else self.head)
        return jax.tree_util.Partial(partial(_logits, self.config, graphdef), nnx.to_pure_dict(weights))

    def score(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows"]:
        """Rewards of hidden states, float32."""
        assert self.head_kind == "reward" and self.head is not None
        return self.head(h)[..., 0]

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], cache_length: int
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Read right-padded prompts: each row's last hidden state, and a cache with room for `cache_length` tokens.

        Rotary embeddings that depend on the length of the text are those of a text that fills the cache: keys that
        were turned for a shorter text could not be used for a longer one.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        h, (keys, values), _ = self._walk(tokens, positions, segments, cache_length, with_cache=True)
        last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return last, Cache.of(keys, values, lengths, cache_length)

    @property
    def cache_grows(self) -> bool:
        """Whether a cache can be given more room later on; not where keys are turned for a text that fills it."""
        return not self.config.turns_by_length

    def unstacked(self) -> tuple[Any, ...]:
        """The weights of each layer for itself."""
        stacked = nnx.split(self.layers)[1]
        return tuple(jax.tree.map(lambda w, i=i: w[i], stacked) for i in range(self.config.num_layers))

    def at_hand(self, *, gather: bool) -> tuple[Any, tuple[Any, ...]]:
        """The arrays as `decode` uses them at every token: those outside of the layers, and those of each layer."""
        state = nnx.to_pure_dict(nnx.state(self))
        del state["layers"]
        ready = partial(at_hand, dtype=self.compute.dtype, gather=gather)
        layers = [nnx.to_pure_dict(layer) for layer in self.unstacked()]
        return ready(state), tuple(ready({"layers": layer})["layers"] for layer in layers)

    def decode(
        self, tokens: Int[Array, "B"], cache: Cache, layers: tuple[Any, ...] | None = None
    ) -> tuple[Float[Array, "B D"], Cache]:
        """One more token a row: its hidden state, and the cache with it appended.

        Layers are unrolled with a cache each: scanning them with the cache copies all of it at every token. `layers` is
        what `unstacked` gives, where that has been done before.
        """
        config = self.config
        angles = rotary_angles(config.rotaries, cache.lengths, cache.room)
        graphdef = nnx.split(self.layers)[0]
        h = self._embedded(tokens)
        for index, weights in enumerate(self.unstacked() if layers is None else layers):
            block = nnx.merge(graphdef, weights)
            kind = config.layer_rotaries[index]
            query, key, value = block.project(h, angles.cos[kind], angles.sin[kind])
            cache = cache.put(index, key, value)
            attended = cache.attend(
                index,
                query,
                scale=config.attention_scale,
                window=config.layer_windows[index],
                softcap=config.attention_softcap,
            )
            h, _ = block.finish(h, attended)
        return self.norm(h), cache._replace(lengths=cache.lengths + 1)

    def _embedded(self, tokens: Int[Array, "rows"]) -> Float[Array, "rows D"]:
        h = self.embed(tokens, self.compute.dtype)
        return h if self.config.embed_scale == 1 else h * self.config.embed_scale

    def _layers(self) -> Layer:
        """[L] of each of a layer's peculiarities."""
        config = self.config
        rotary = jnp.asarray(config.layer_rotaries) if len(config.rotaries) > 1 else None
        windows = [config.max_positions + 2**30 if window is None else window for window in config.layer_windows]
        return Layer(rotary, jnp.asarray(windows) if any(config.layer_windows) else None)

    def _walk(
        self, tokens: Array, positions: Array, segments: Array, lengths: Array | int, *, with_cache: bool
    ) -> tuple[Array, tuple, Array]:
        """Scan the blocks: hidden states, every layer's keys and values if asked for, and the load-balancing loss."""
        config, places, shape = self.config, Places(positions, segments), tokens.shape
        angles = rotary_angles(config.rotaries, positions.reshape(-1), lengths)
        real = segments.reshape(-1) > 0
        branches = self.compute.branches and config.reads_branches and not with_cache
        graphdef, stacked = nnx.split(self.layers)

        def body(h: Array, layer: tuple[Any, Layer]) -> tuple[Array, tuple]:
            block, h = nnx.merge(graphdef, layer[0]), named_input(h)
            kind = 0 if layer[1].rotary is None else layer[1].rotary
            projected = block.project(h, angles.cos[kind], angles.sin[kind])
            query, key, value = (x.reshape(*shape, *x.shape[1:]) for x in to_heads(*projected))
            attended = attention(
                query,
                key,
                value,
                places,
                scale=config.attention_scale,
                window=layer[1].window,
                softcap=config.attention_softcap,
                kernel=self.compute.attention,
                branches=branches,
            )
            h, routing = block.finish(h, to_tokens(attended.reshape(-1, *attended.shape[2:])))
            cached = tuple(x.reshape(*shape, *x.shape[1:]) for x in projected[1:]) if with_cache else ()
            return constrain(h, "tokens", None), (cached, () if routing is None else balance_terms(routing, real))

        body = rematerialised(body, self.compute.remat)
        h = constrain(self._embedded(tokens.reshape(-1)), "tokens", None)
        h, (cached, terms) = jax.lax.scan(body, h, (stacked, self._layers()))
        balance = balance_loss(terms[0], terms[1], jnp.sum(real)) if terms else jnp.zeros(())
        return self.norm(h).reshape(*shape, -1), cached, balance
