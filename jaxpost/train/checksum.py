"""Checksums of arrays where they are: of the bits, the same however the array is laid out over devices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxpost.sharding import on_devices

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def checksums(tree: Any) -> tuple[list[Array], list[Array]]:
    """Of each leaf of a tree, uint32, in the order of `jax.tree.leaves`; and whether all its numbers are finite.

    Every element is hashed together with its index, and the hashes are added up modulo 2^32: the order of the sum does
    not matter, so any layout gives the same. Each hash is a bijection of the element's bits, so that one element that
    is wrong is always found, and several with a probability of 1 - 2^-32.

    The hash is MurmurHash3's finaliser (Appleby, 2011, public domain).
    """
    leaves = jax.tree.leaves(on_devices(tree))
    return [_checksum(leaf) for leaf in leaves], [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]


def _checksum(x: Array) -> Array:
    bits = x.astype(jnp.uint8) if x.dtype == bool else lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize])
    index, stride = jnp.uint32(len(x.shape)), 1
    for dim in reversed(range(x.ndim)):
        index = index + lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= x.shape[dim]
    return jnp.sum(_mixed(bits.astype(jnp.uint32) ^ _mixed(index)), dtype=jnp.uint32)


def _mixed(h: Array) -> Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
