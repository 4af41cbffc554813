"""Matrices in few bits: 4-bit NormalFloat and 8-bit integers, as pure functions on arrays.

Matrices are kernels [..., in, out], alone or stacked. What they are stored as is a dict of arrays whose last dimension
is `out`, so that a slice of the outputs is a slice of every part; see `jaxpost.sharding` for how parts are laid out.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jaxpost.errors import ConfigError

BLOCK = 64  # inputs of one output that share an absmax
GROUP = 256  # absmax that share the scale of their 8 bits
FLOOR = 1e-6  # of the largest absmax of a group; blocks below are taken for zeros
SHIFTS = np.array([4, 0], np.uint8).reshape(2, 1, 1)
# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero: appendix E of the paper.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

Parts = dict[str, Array]


def quantize_nf4(kernel: Float[Array, "*stack in out"], *, nested: bool = True) -> Parts:
    """4-bit NormalFloat (Dettmers et al., 2023, "QLoRA", arXiv:2305.14314, section 3).

    A block of 64 inputs of one output is stored as the nearest of 16 levels, and its absmax, the largest magnitude,
    which is what levels are multiples of. Where `in` is no multiple of 64, blocks are as large as divides both.

    Without `nested` absmax are float32: 0.5625 bytes a weight. With it, those of 256 outputs (fewer in the last group)
    take 8 bits each: 0.516. This is not bitsandbytes' code, which crowds around the mean of a tensor's absmax, but 256
    equal steps between the logarithms of the group's smallest and largest one. It is closer, above all where outputs
    differ in size, and needs no mean of all, so any slice can be quantised alone. Levels are the nearest for the absmax
    as it is stored.

    Returns:
        codes: uint8 [..., in/64, 32, out]; input i of a block is in the high half of byte i, input 32 + i in the low.
        absmax: [..., in/64, out], float32, or uint8 if nested; then it means exp(absmax_low + absmax_step * absmax).
        absmax_low, absmax_step: float32 [..., in/64, ceil(out/256)], only if nested.

    Raises:
        ConfigError: `in` is odd; two codes share a byte.
    """
    *stack, num_inputs, num_outputs = kernel.shape
    size = math.gcd(num_inputs, BLOCK)
    if size == 1:
        raise ConfigError(
            f"a kernel with {num_inputs} inputs, an odd number, cannot be stored in 4 bits; load_in_8bit can"
        )
    blocks = kernel.astype(jnp.float32).reshape(*stack, num_inputs // size, size, num_outputs)
    absmax = jnp.max(jnp.abs(blocks), axis=-2)
    parts = _compress(absmax) if nested else {"absmax": absmax}
    stored = _absmax(parts)[..., None, :]
    scaled = blocks / jnp.where(stored == 0, 1, stored)
    levels = np.array(LEVELS, np.float32)
    codes = sum((scaled > middle).astype(jnp.uint8) for middle in (levels[1:] + levels[:-1]) / 2)
    high, low = jnp.split(codes, 2, axis=-2)
    return {"codes": high << 4 | low, **parts}


def dequantize_nf4(parts: Parts, dtype: Any) -> Float[Array, "*stack in out"]:
    """The kernel that `quantize_nf4` stored; computed in float32, then cast."""
    codes = parts["codes"]
    *stack, num_blocks, half, num_outputs = codes.shape
    halves = (codes[..., None, :, :] >> SHIFTS & 15).astype(jnp.int32)
    # A choice, not a look-up: TPUs gather slowly.
    levels = lax.select_n(halves, *(jnp.full(halves.shape, level, jnp.float32) for level in LEVELS))
    kernel = (levels * _absmax(parts)[..., None, None, :]).astype(dtype)
    return kernel.reshape(*stack, num_blocks * 2 * half, num_outputs)


def quantize_int8(kernel: Float[Array, "*stack in out"]) -> Parts:
    """The nearest of 255 multiples of each output's largest magnitude / 127.

    The weights of Dettmers et al., 2022, "LLM.int8()", arXiv:2208.07339, section 2; activations are not quantised.

    Returns:
        integers: int8 [..., in, out].
        scale: float32 [..., out].
    """
    kernel = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(kernel), axis=-2) / 127
    integers = jnp.round(kernel / jnp.where(scale == 0, 1, scale)[..., None, :])
    return {"integers": integers.astype(jnp.int8), "scale": scale}


def dequantize_int8(parts: Parts, dtype: Any) -> Float[Array, "*stack in out"]:
    """The kernel that `quantize_int8` stored; computed in float32, then cast."""
    return (parts["integers"].astype(jnp.float32) * parts["scale"][..., None, :]).astype(dtype)


def _compress(absmax: Float[Array, "*stack blocks out"]) -> Parts:
    """Double quantisation: each group's absmax in 255 equal steps of the logarithm."""
    *others, num_outputs = absmax.shape
    room = [(0, 0)] * len(others) + [(0, -num_outputs % GROUP)]
    groups = jnp.pad(absmax, room, mode="edge").reshape(*others, -1, GROUP)
    peak = jnp.max(groups, axis=-1, keepdims=True)
    # What the absmax of zeros is does not matter: the nearest level is 0.
    logs = jnp.log(jnp.where(groups <= FLOOR * peak, jnp.where(peak == 0, 1, peak), groups))
    low = jnp.min(logs, axis=-1, keepdims=True)
    step = (jnp.max(logs, axis=-1, keepdims=True) - low) / 255
    codes = jnp.round((logs - low) / jnp.where(step == 0, 1, step)).astype(jnp.uint8)
    codes = codes.reshape(*others, -1)[..., :num_outputs]
    return {"absmax": codes, "absmax_low": low[..., 0], "absmax_step": step[..., 0]}


def _absmax(parts: Parts) -> Float[Array, "*stack blocks out"]:
    """What the levels are multiplied with."""
    absmax = parts["absmax"]
    if "absmax_step" not in parts:
        return absmax
    low, step = (
        jnp.repeat(parts[name], GROUP, axis=-1)[..., : absmax.shape[-1]] for name in ("absmax_low", "absmax_step")
    )
    return jnp.exp(low + step * absmax.astype(jnp.float32))
