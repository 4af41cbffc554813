"""The weights of attention and their sum, rounded alike in every program.

XLA on CPU takes `jnp.exp` and `jnp.sum` from one library or another, as it happens to fuse the operations around them,
and these differ in the last place. A token then has other log-probabilities where it is sampled than where it is
trained on. So on CPU the exponential is written out, and the total is a product, summed as that with the values is.
"""

import math

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float32

from jaxpost.platform import platform

LEAST = -87.0  # below it e^x is no normal float32
LN2_HIGH = 0.693359375  # its products with whole numbers up to 2^14 are exact (Cody and Waite, 1980)
LN2_LOW = math.log(2) - LN2_HIGH
LANES = 16  # columns of ones
DEGREE = 7  # of the Taylor series: its error is below 6e-9 for half of ln 2


def exp(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """e^x for x of at most 88, to two units in the last place; 0 below -87. It has no gradient of its own."""
    if platform() != "cpu":
        return jnp.exp(x)
    within = jnp.maximum(x, LEAST)
    twos = jnp.round(within / math.log(2))
    rest = (within - twos * LN2_HIGH) - twos * LN2_LOW
    series = jnp.full_like(rest, 1 / math.factorial(DEGREE))
    for k in reversed(range(DEGREE)):
        series = series * rest + 1 / math.factorial(k)
    power = lax.bitcast_convert_type((twos.astype(jnp.int32) + 127) << 23, jnp.float32)
    return jnp.where(x < LEAST, 0.0, series * power)


def total(weights: Float32[Array, "*rows S"]) -> Float32[Array, "*rows 1"]:
    """Their sum over the keys."""
    if platform() != "cpu":
        return jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.matmul(weights, jnp.ones((weights.shape[-1], LANES)))[..., :1]
