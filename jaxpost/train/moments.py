"""Moments that take less memory than Adam's two float32 arrays: bfloat16, 8-bit blocks, factored.

Every leaf of a state lies at the path of its parameter and has as many dimensions (or none), so the parameters'
sharding table lays it out.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jaxtyping import Float, Int, Int8, UInt8

from jaxpost.sharding import path_of
from jaxpost.train.state import DECAYED

BLOCK = 256  # elements that share a scale
SMALLEST = 4096  # a layer's arrays of fewer elements stay float32, as in bitsandbytes
DECADES = 7  # powers of ten that an 8-bit code covers


def is_matrix(path: Any) -> bool:
    """Whether the parameter at this key path is a (stack of) matrices in its last two dimensions; else of vectors."""
    return path_of(path).endswith(DECAYED)


def adam_bf16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam with both moments stored in bfloat16; 4 bytes a parameter.

    The second moment moves by 1 - beta2 = 0.1 % a step, and bfloat16's neighbours are 0.4 % to 0.8 % apart: rounded
    to nearest it would stay what it was. So it is rounded up or down at random, and right on average. The first
    moment moves by 10 % and needs no noise.

    Args:
        adam: `optax.scale_by_adam`, which computes in float32.
    """

    def init(params: Any) -> Any:
        return adam.init(_cast(params, jnp.bfloat16))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mu, nu = _cast(state.mu, jnp.float32), _cast(state.nu, jnp.float32)
        updates, new = _adam_update(adam, updates, state.count, mu, nu)
        nu = jax.tree.map(_round_randomly, new.nu, _noise(new.nu, state.count))
        return updates, optax.ScaleByAdamState(new.count, _cast(new.mu, jnp.bfloat16), nu)

    return optax.GradientTransformation(init, update)


class BlockwiseAdamState(NamedTuple):
    """Adam's state in blocks; an array that stays float32 has its moments here as they are, and scalars as scales.

    Attributes:
        step: updates done.
        mu: first moments, int8 codes.
        nu: second moments, uint8 codes.
        mu_scale: float32 largest absolute values of the blocks of `mu`: [..., ceil(dim / 256)].
        nu_scale: likewise of `nu`.
    """

    step: Array
    mu: Any
    nu: Any
    mu_scale: Any
    nu_scale: Any


def adam_8bit(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam with 8-bit moments in blocks of 256 along the last dimension (Dettmers et al., 2021, arXiv:2110.02861).

    As in the paper, embeddings stay float32. Unlike there, the second moment is rounded at random: it moves by 0.1 %
    a step, and its codes are 0.7 % or more apart.

    Args:
        adam: `optax.scale_by_adam`, which computes in float32.
    """

    def init(params: Any) -> BlockwiseAdamState:
        coded = jax.tree_util.tree_map_with_path(_is_coded, params)

        def codes(dtype: Any) -> Any:
            return jax.tree.map(lambda p, c: jnp.zeros(p.shape, dtype if c else jnp.float32), params, coded)

        def scales() -> Any:
            return jax.tree.map(lambda p, c: jnp.zeros(_scales_shape(p.shape) if c else ()), params, coded)

        return BlockwiseAdamState(jnp.zeros((), jnp.int32), codes(jnp.int8), codes(jnp.uint8), scales(), scales())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, BlockwiseAdamState]:
        def load(codes: Array, scales: Array) -> Array:
            return codes if codes.dtype == jnp.float32 else decode(codes, scales)

        def scale(new: Array, codes: Array, scales: Array) -> Array:
            return scales if codes.dtype == jnp.float32 else block_scales(new)

        def store(new: Array, codes: Array, scales: Array, threshold: Any) -> Array:
            return new if codes.dtype == jnp.float32 else encode(new, scales, threshold, codes.dtype)

        mu, nu = jax.tree.map(load, state.mu, state.mu_scale), jax.tree.map(load, state.nu, state.nu_scale)
        updates, new = _adam_update(adam, updates, state.step, mu, nu)
        mu_scale = jax.tree.map(scale, new.mu, state.mu, state.mu_scale)
        nu_scale = jax.tree.map(scale, new.nu, state.nu, state.nu_scale)
        mu = jax.tree.map(partial(store, threshold=0.5), new.mu, state.mu, mu_scale)
        uniform = jax.tree.map(lambda bits: bits.astype(jnp.float32) / 2**16, _noise(new.nu, state.step))
        nu = jax.tree.map(store, new.nu, state.nu, nu_scale, uniform)
        return updates, BlockwiseAdamState(new.count, mu, nu, mu_scale, nu_scale)

    return optax.GradientTransformation(init, update)


def block_scales(x: Float[Array, "*rows dim"]) -> Float[Array, "*rows blocks"]:
    """Largest absolute value of each block of 256 along the last dimension; the last block may be shorter."""
    unit = _unit(x.shape[-1])
    small = jnp.max(jnp.abs(x).reshape(*x.shape[:-1], -1, unit), axis=-1)
    per_block = BLOCK // unit
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -small.shape[-1] % per_block)]
    return jnp.max(jnp.pad(small, padding).reshape(*x.shape[:-1], -1, per_block), axis=-1)


def encode(
    x: Float[Array, "*rows dim"], scales: Float[Array, "*rows blocks"], threshold: Any, dtype: Any
) -> Int8[Array, "*rows dim"] | UInt8[Array, "*rows dim"]:
    """Codes of `x`, each the neighbour below in magnitude, or the one above from `threshold` of the way to it on.

    Args:
        x: values; none below 0 for uint8.
        scales: of `block_scales`.
        threshold: 0.5 rounds to nearest; uniform random numbers in [0, 1) round right on average.
        dtype: int8 has 127 magnitudes with a sign, uint8 254.
    """
    levels = 1 if dtype == jnp.int8 else 2
    scale = _spread(scales, x.shape[-1])
    magnitude = jnp.where(scale > 0, jnp.abs(x) / jnp.where(scale > 0, scale, 1), 0)
    # A code in the right decade, then the largest code whose value is not above.
    value = magnitude * _top(levels)
    decade = sum(((value > 10.0**-k).astype(jnp.int32) for k in range(1, DECADES)), jnp.zeros((), jnp.int32))
    cells = levels << decade
    cell = jnp.floor((value / _power(decade) - 0.1) / 0.9 * cells).astype(jnp.int32)
    code = jnp.clip(cell, 0, cells - 1) + cells - levels + 1
    code -= _magnitude(code, levels) > magnitude
    below, above = _magnitude(code, levels), _magnitude(code + 1, levels)
    code = jnp.minimum(code + (magnitude - below > threshold * (above - below)), levels * (2**DECADES - 1))
    if dtype == jnp.uint8:
        # A second moment of 0 beside a first moment that is not would divide by epsilon alone.
        return jnp.where(x > 0, jnp.maximum(code, 1), code).astype(jnp.uint8)
    return jnp.where(x < 0, -code, code).astype(jnp.int8)


def decode(
    codes: Int8[Array, "*rows dim"] | UInt8[Array, "*rows dim"], scales: Float[Array, "*rows blocks"]
) -> Float[Array, "*rows dim"]:
    """The values of codes, float32."""
    levels = 1 if codes.dtype == jnp.int8 else 2
    magnitude = _magnitude(jnp.abs(codes.astype(jnp.int32)), levels) * _spread(scales, codes.shape[-1])
    return jnp.where(codes < 0, -magnitude, magnitude)


def _magnitude(code: Int[Array, "..."], levels: int) -> Float[Array, "..."]:
    """What a code stands for, in [0, 1]: the paper's dynamic map, by arithmetic, since accelerators look up slowly.

    Decade k of 7 has `levels` * 2**k codes at the middles of even cells between 0.1 and 1. Divided by the last
    middle, a block's largest value is exact for both signs; the paper has an extra code for +1 alone.
    """
    count = jnp.maximum(code, 1) + levels - 1
    decade = 31 - lax.clz(count // levels)
    cells = levels << decade
    middle = 0.1 + 0.9 * (count - cells + 0.5) / cells
    return jnp.where(code > 0, _power(decade) * middle / _top(levels), 0)


def _power(decade: Int[Array, "..."]) -> Float[Array, "..."]:
    """10 ** (decade - 6), from the binary digits of the exponent: `pow` takes most of a step's time on a CPU."""
    down = DECADES - 1 - decade
    return jnp.where(down & 1, 1e-1, 1.0) * jnp.where(down & 2, 1e-2, 1.0) * jnp.where(down & 4, 1e-4, 1.0)


def _top(levels: int) -> float:
    return 1 - 0.45 / (levels << (DECADES - 1))


def _unit(dim: int) -> int:
    """How many elements a block is first reduced by."""
    # Blocks may straddle devices. Units this small hardly ever do, so only an array of 1/32 of the size has to move.
    return math.gcd(dim, 32)


def _spread(scales: Float[Array, "*rows blocks"], dim: int) -> Float[Array, "*rows dim"]:
    """Each element's scale."""
    unit = _unit(dim)
    small = jnp.repeat(scales, BLOCK // unit, axis=-1)[..., : dim // unit]
    return jnp.broadcast_to(small[..., None], (*small.shape, unit)).reshape(*scales.shape[:-1], dim)


def _scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], math.ceil(shape[-1] / BLOCK))


def _is_coded(path: Any, param: Array) -> bool:
    elements = math.prod(param.shape[-2:] if is_matrix(path) else param.shape[-1:])
    return elements >= SMALLEST and not path_of(path).endswith(".embedding")


def _adam_update(adam: optax.GradientTransformation, grads: Any, count: Any, mu: Any, nu: Any) -> tuple[Any, Any]:
    return adam.update(grads, optax.ScaleByAdamState(count, mu, nu))


def _noise(tree: Any, count: Int[Array, ""]) -> Any:
    """16 random bits for each element, by update number and leaf; the same on any mesh."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))
    bits = [jax.random.bits(key, leaf.shape, jnp.uint16) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, bits)


def _round_randomly(x: Float[Array, "..."], noise: Array) -> Array:
    """Non-negative float32 to bfloat16: up with the probability of the part that is cut off."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) + noise.astype(jnp.uint32)
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


class FactoredState(NamedTuple):
    """Adafactor's second moments.

    Attributes:
        step: updates done.
        row: means over the columns of a matrix [..., in, 1]; of a vector, all of it.
        column: means over its rows [..., 1, out]; a scalar for a vector.
    """

    step: Array
    row: Any
    column: Any


def scale_by_adafactor() -> optax.GradientTransformation:
    """Adafactor without relative steps and parameter scales (Shazeer and Stern, 2018, arXiv:1804.04235).

    transformers' Adafactor with scale_parameter=False, relative_step=False and its defaults. Each matrix of a stack is
    one of its own. optax.adafactor would factor a stack along its two largest dimensions, and clip it as a whole.
    """

    def init(params: Any) -> FactoredState:
        def row(path: Any, param: Array) -> Array:
            return jnp.zeros((*param.shape[:-1], 1) if is_matrix(path) else param.shape)

        def column(path: Any, param: Array) -> Array:
            return jnp.zeros((*param.shape[:-2], 1, param.shape[-1]) if is_matrix(path) else ())

        by_path = jax.tree_util.tree_map_with_path
        return FactoredState(jnp.zeros((), jnp.int32), by_path(row, params), by_path(column, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, FactoredState]:
        step = state.step + 1
        share = step.astype(jnp.float32) ** -0.8  # of the new gradient

        def row(old: Array, column: Array, grad: Array) -> Array:
            square = grad**2 + 1e-30
            return old + share * ((jnp.mean(square, -1, keepdims=True) if column.ndim else square) - old)

        def column(old: Array, grad: Array) -> Array:
            return old + share * (jnp.mean(grad**2 + 1e-30, -2, keepdims=True) - old) if old.ndim else old

        def scaled(grad: Array, row: Array, column: Array) -> Array:
            if column.ndim:
                update = grad * lax.rsqrt(row / jnp.mean(row, -2, keepdims=True)) * lax.rsqrt(column)
                square = jnp.mean(update**2, (-2, -1), keepdims=True)
            else:
                update = grad * lax.rsqrt(row)
                square = jnp.mean(update**2, -1, keepdims=True)
            return update / jnp.maximum(jnp.sqrt(square), 1.0)

        rows = jax.tree.map(row, state.row, state.column, updates)
        columns = jax.tree.map(column, state.column, updates)
        return jax.tree.map(scaled, updates, rows, columns), FactoredState(step, rows, columns)

    return optax.GradientTransformation(init, update)
