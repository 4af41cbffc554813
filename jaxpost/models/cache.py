"""What decoding keeps of the tokens before, and the attention of one more token to them.

On CPU keys are kept in blocks of slots, turned so that a block has its slots in its last dimension. Scores are then
sums over the last but one, which XLA vectorises and reads from front to back: half the time of any product with keys
that lie token by token. What is read, multiplied, rounded and in which order is as in `attention`, so that both give
the same to the bit in rows whose tiles have all keys at once (`tiles`).
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, Num

from jaxpost.models.attention import NEGATIVE, capped
from jaxpost.models.softmax import exp, total
from jaxpost.platform import platform

BLOCK = 64  # slots


class Cache(NamedTuple):
    """Keys and values of every layer; slot s of a row holds position s.

    Attributes:
        keys: one array a layer, as `laid_out` has it: updating one never copies another.
        values: likewise, [B, K, S, d]. On CPU the bits of bfloat16 stand as integers in both.
        lengths: [B] number of filled slots.
    """

    keys: tuple[Num[Array, "B K S d"] | Num[Array, "B K n d s"], ...]
    values: tuple[Num[Array, "B K S d"], ...]
    lengths: Int[Array, "B"]

    @classmethod
    def of(
        cls,
        keys: Iterable[Float[Array, "B T K d"]],
        values: Iterable[Float[Array, "B T K d"]],
        lengths: Int[Array, "B"],
        room: int,
    ) -> "Cache":
        """Of the keys and values of each layer, the first `lengths` of which count, with room for so many tokens."""
        by_head = (tuple(_bits(x).swapaxes(1, 2) for x in layers) for layers in (keys, values))
        keys, values = by_head
        return cls(tuple(map(laid_out, keys)), values, lengths).grown(room)

    @property
    def room(self) -> int:
        """Tokens, S, that it can hold."""
        return self.values[0].shape[2]

    def grown(self, room: int) -> "Cache":
        """The same with room for so many tokens."""
        size = room if self.keys[0].ndim == 4 else -(-room // BLOCK)
        keys, values = (tuple(_longer(x, n) for x in layers) for layers, n in ((self.keys, size), (self.values, room)))
        return Cache(keys, values, self.lengths)

    def put(self, layer: int, key: Float[Array, "B K d"], value: Float[Array, "B K d"]) -> "Cache":
        """The same with one more token a row in a layer; `lengths` stays until all layers have it."""
        rows, heads, slots = jnp.arange(len(key))[:, None], jnp.arange(key.shape[1]), self.lengths[:, None]
        keys, values = self.keys[layer], self.values[layer]
        at: tuple = (slots,)
        if keys.ndim == 5:
            key, at = _as_summed(key), (slots // BLOCK, slice(None), slots % BLOCK)
        keys, values = keys.at[rows, heads, *at].set(_bits(key)), values.at[rows, heads, slots].set(_bits(value))
        return self._replace(keys=_with(self.keys, layer, keys), values=_with(self.values, layer, values))

    def attend(
        self,
        layer: int,
        query: Float[Array, "B H d"],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Float[Array, "B H d"]:
        """Attention of one token a row, which was just put there, to the tokens of a layer; scores in float32.

        All of the cache is read, since XLA on CPU copies what is sliced out of it.

        Args:
            layer: its number.
            query: H heads share the K heads of the cache.
            scale, softcap: as of `attention`.
            window: tokens that it sees, itself included; None for all.
        """
        values, length = _numbers(self.values[layer]), self.lengths[:, None]
        grouped = query.reshape(len(query), values.shape[1], -1, query.shape[2]) * scale
        scores = capped(_products(grouped, _numbers(self.keys[layer]), self.room), softcap)
        slots = jnp.arange(self.room)
        visible = slots <= length
        if window is not None:
            visible &= slots > length - window
        scores = jnp.where(visible[:, None, None], scores, NEGATIVE)
        weights = exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        out = jnp.einsum("bkgs,bksd->bkgd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return (out / total(weights)).astype(query.dtype).reshape(query.shape)


def laid_out(keys: Num[Array, "B K S d"]) -> Num[Array, "B K S d"] | Num[Array, "B K n d s"]:
    """Keys as the platform reads them best."""
    if platform() != "cpu":
        return keys
    batch, heads, room, dim = keys.shape
    keys = _as_summed(_longer(keys, room + -room % BLOCK))
    return keys.reshape(batch, heads, -1, BLOCK, dim).swapaxes(3, 4)


def _products(query: Float[Array, "B K G d"], keys: Array, room: int) -> Float[Array, "B K G S"]:
    """Of each query with the keys of its head."""
    if keys.ndim == 4:
        return jnp.einsum("bkgd,bksd->bkgs", query, keys, preferred_element_type=jnp.float32)
    query, keys = _as_summed(query).astype(jnp.float32), keys.astype(jnp.float32)
    scores = jnp.sum(query[:, :, :, None, :, None] * keys[:, :, None], axis=4)
    return scores.reshape(*query.shape[:3], -1)[..., :room]


def _as_summed(x: Num[Array, "*shape d"]) -> Num[Array, "*shape d"]:
    """In the order in which a product sums: of bfloat16 the second of each two numbers first, as processors do it."""
    return x if x.dtype.itemsize == 4 else x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)


def _bits(x: Array) -> Array:
    """As the cache has it: XLA on CPU would take all of it through float32 for each token that is put there."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 and platform() == "cpu" else x


def _numbers(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _longer(x: Array, size: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, 0), (0, size - x.shape[2]), *[(0, 0)] * (x.ndim - 3)])


def _with(layers: tuple[Array, ...], number: int, new: Array) -> tuple[Array, ...]:
    return (*layers[:number], new, *layers[number + 1 :])
