"""Adapters: small modules that hang on a layer and say what it computes instead of `x @ kernel`.

LoRA (Hu et al., 2021, arXiv:2106.09685) adds a product of two thin matrices: y = x W + s (x A) B, where s is alpha / r,
or alpha / sqrt(r) (rsLoRA; Kalajdzievski, 2023, arXiv:2312.03732). A `Copy` is trained in the place of a whole kernel.
No kernel is ever changed: a model without its adapters is its base, to the bit, and adapters can share one base. What
is trained is told by the type of its Variable.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int, Key, UInt32

from jaxpost.models.lora_config import LoraConfig
from jaxpost.models.product import product

ADAPTERS = "adapters"  # where a decoder keeps those that are not in use


class LoRAParam(nnx.Variable):
    """What is trained of an adapter; float32 whatever the base's dtype."""


class FrozenLoRA(nnx.Variable):
    """What is not trained of an adapter; all of it while it is not in use."""


class DropoutKey(nnx.Variable):
    """A layer's key of this step, there while it trains; see `with_dropout`."""


class LoRA(nnx.Module):
    """y = x W + (dropout(x) A) (s B); each array is stacked like the kernel W [in, out] that it hangs on.

    With a magnitude m [out] it is DoRA (Liu et al., 2024, arXiv:2402.09353): each column of W + s A B is brought to the
    length m. Its own length counts as a constant in gradients, as the paper's section 4.3 has it.

    Attributes:
        lora_a, lora_b: A [in, R] and B [R, out]; a layer of a smaller rank has zeros behind, which stay zeros.
        scale: s of each layer; 0 for a layer that is left out.
        magnitude: of DoRA.
        initial_a, initial_b: taken off again, so that the layer starts as what it was: what PiSSA and OLoRA begin with.
        ranks: of each layer, 0 for one that is left out; one number where there are no layers.
        dropout: share of the inputs of A that is dropped where there is a key.
        key: of the dropout, set for a training step.
    """

    def __init__(self, arrays: dict[str, Array], ranks: tuple[int, ...], dropout: float | int = 0):
        self.lora_a = LoRAParam(arrays["lora_a"])
        self.lora_b = LoRAParam(arrays["lora_b"])
        self.scale = FrozenLoRA(arrays["scale"])
        self.magnitude = nnx.data(LoRAParam(arrays["magnitude"]) if "magnitude" in arrays else None)
        self.initial_a = nnx.data(FrozenLoRA(arrays["initial_a"]) if "initial_a" in arrays else None)
        self.initial_b = nnx.data(FrozenLoRA(arrays["initial_b"]) if "initial_b" in arrays else None)
        self.ranks = ranks
        self.dropout = dropout
        self.key: DropoutKey | None = nnx.data(None)

    def factors(self) -> tuple[Float[Array, "*stack in R"], Float[Array, "*stack R out"]]:
        """Two thin matrices whose product is what W changes by; A, and B with the scale in it."""
        a, b = self.lora_a[...], self.lora_b[...]
        if self.initial_a is not None and self.initial_b is not None:
            a = jnp.concatenate([a, self.initial_a[...]], axis=-1)
            b = jnp.concatenate([b, -self.initial_b[...]], axis=-2)
        scale = self.scale[...]
        return a, b * scale.reshape(scale.shape + (1,) * (b.ndim - scale.ndim))

    def project(
        self, x: Float[Array, "*rows in"], kernel: Float[Array, "in out"], dtype: Any = None
    ) -> Float[Array, "*rows out"]:
        """The layer's output, its bias aside."""
        y = product(x, kernel, dtype)
        a, b = (factor.astype(x.dtype) for factor in self.factors())
        kept = self._drop(x)
        update = product(product(kept, a), b, dtype)
        if self.magnitude is None:
            return y + update
        base = y if kept is x else product(kept, kernel, dtype)
        gain = self._gain(kernel)
        return y + ((gain - 1) * base + gain * update).astype(y.dtype)

    def lookup(self, tokens: Int[Array, "rows"], table: Float[Array, "V D"], dtype: str) -> Float[Array, "rows D"]:
        """Rows of an embedding, which is a linear layer whose inputs are one-hot; PEFT drops none of them."""
        a, b = self.factors()
        rows = jnp.take(table, tokens, axis=0).astype(dtype)
        update = jnp.take(a, tokens, axis=0).astype(dtype) @ b.astype(dtype)
        if self.magnitude is None:
            return rows + update
        return (self._gain(table) * (rows + update)).astype(dtype)

    def merged(self, kernel: Float[Array, "*stack in out"]) -> Float[Array, "*stack in out"]:
        """The kernel that does by itself what the layer does with this adapter, float32."""
        a, b = self.factors()
        changed = kernel.astype(jnp.float32) + a @ b
        return changed if self.magnitude is None else changed * self._gain(kernel)[..., None, :]

    def _drop(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows in"]:
        if self.key is None:
            return x
        dropped = uniform_bits(self.key[...], x.shape) < np.uint32(self.dropout * 2**32)
        return jnp.where(dropped, 0, x / (1 - self.dropout)).astype(x.dtype)

    def _gain(self, kernel: Float[Array, "*stack in out"]) -> Float[Array, "*stack out"]:
        """What each output is multiplied with: m over the length of its column."""
        assert self.magnitude is not None
        a, b = self.factors()
        length = jax.lax.stop_gradient(column_lengths(kernel.astype(jnp.float32) + a @ b))
        gain = self.magnitude[...] / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)
        return jnp.where(self.scale[...] == 0, 1.0, gain)


def uniform_bits(key: Key[Array, ""], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Random bits from hashed counters: the same on every mesh, as jax.random's are, at a few operations an element.

    A mask for each linear layer is as many numbers as a model has activations; drawn by threefry they took longer on a
    CPU than the matrix products. The hash is Wellons, 2018, "Prospecting for Hash Functions" (lowbias32), between whose
    rounds the second half of the key comes in.
    """
    first, second = jax.random.key_data(key)
    counters = jax.lax.iota(np.uint32, math.prod(shape)).reshape(shape)
    bits = counters ^ first
    for word in (second, np.uint32(0)):
        bits = (bits ^ bits >> 16) * np.uint32(0x7FEB352D)
        bits = (bits ^ bits >> 15) * np.uint32(0x846CA68B)
        bits = (bits ^ bits >> 16) + word
    return bits


class Copy(nnx.Module):
    """A kernel [in, out], or an embedding [V, D], that is trained and used in the place of the layer's own."""

    def __init__(self, kernel: Float[Array, "in out"]):
        self.kernel = LoRAParam(kernel)

    def project(
        self, x: Float[Array, "*rows in"], kernel: Float[Array, "in out"], dtype: Any = None
    ) -> Float[Array, "*rows out"]:
        """The layer's output, its bias aside."""
        return product(x, self.kernel[...].astype(x.dtype), dtype)

    def lookup(self, tokens: Int[Array, "rows"], table: Float[Array, "V D"], dtype: str) -> Float[Array, "rows D"]:
        """Rows of an embedding."""
        return jnp.take(self.kernel[...], tokens, axis=0).astype(dtype)

    def merged(self, kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """The kernel that does by itself what the layer does with this adapter, float32."""
        return self.kernel[...]


Adapter = LoRA | Copy


class AdapterSet(nnx.Module):
    """One adapter of a decoder: how it was made and, while it is not in use, its modules by their places' paths."""

    def __init__(self, config: LoraConfig):
        self.config = config
        self.parts = nnx.Dict()


class Adapters(nnx.Module):
    """All adapters of a decoder by name; the modules of the active one hang on its layers."""

    def __init__(self) -> None:
        self.active: str | None = None
        self.sets = nnx.Dict()


def project(
    adapter: Adapter | None, x: Float[Array, "*rows in"], kernel: Array, dtype: Any = None, *, turned: bool = False
) -> Float[Array, "*rows out"]:
    """x @ kernel, or what the adapter makes of it: what every linear layer computes, its bias aside.

    Args:
        adapter: None for none.
        x: the inputs.
        kernel: [in, out], in the dtype of x.
        dtype: of the result; by default that of x.
        turned: the kernel is [out, in].
    """
    if adapter is None:
        return product(x, kernel, dtype, turned=turned)
    return adapter.project(x, kernel.T if turned else kernel, dtype)


def column_lengths(kernel: Float[Array, "*stack in out"]) -> Float[Array, "*stack out"]:
    """Euclidean length of what makes up each output."""
    return jnp.sqrt(jnp.sum(kernel * kernel, axis=-2))


def trainable_filter(model: nnx.Module) -> Any:
    """The nnx filter of what is trained: the active adapter where there is one, else all parameters."""
    return LoRAParam if jax.tree.leaves(nnx.state(model, LoRAParam)) else nnx.Param


def with_dropout(model: Any, key: Key[Array, ""]) -> Any:
    """The model as it trains, on the same arrays: its adapters drop inputs as a pure function of `key`.

    A model that this was not called on drops nothing. Chunks of tokens that a head scores one by one share a mask.

    Args:
        model: a decoder.
        key: of this micro-batch of this step; each layer of each module has its own, folded from it.
    """
    model = view(model)
    for path, module in nnx.iter_modules(model):
        if isinstance(module, LoRA) and module.dropout and ADAPTERS not in path:
            own = jax.random.fold_in(key, zlib.crc32(".".join(map(str, path)).encode()))
            layers = module.scale[...].shape
            module.key = DropoutKey(jax.random.split(own, layers) if layers else own)
    return model


def view(model: Any) -> Any:
    """Another model on the same arrays, whose modules can be exchanged without touching the first one's."""
    return nnx.merge(*nnx.split(model))
