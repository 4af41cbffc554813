"""Products of rows that stand in groups, each with a matrix of its own."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from jaxpost.models import grouped_triton
from jaxpost.platform import platform

TILE = 512  # rows, inputs and outputs of a tile of the TPU kernel, but for arrays that have fewer


def grouped_product(
    rows: Float[Array, "N in"], kernels: Float[Array, "E in out"], sizes: Int[Array, "E"]
) -> Float[Array, "N out"]:
    """Each row times the matrix of its group.

    Args:
        rows: those of group 0, of group 1, and so on; what comes of rows beyond the last group is not promised.
        kernels: a matrix a group.
        sizes: rows of each group.
    """
    on = platform()
    if on == "cuda" and grouped_triton.fits(kernels):
        return grouped_triton.product(rows, kernels, sizes)
    return _product(rows, kernels, sizes) if on == "tpu" else lax.ragged_dot(rows, kernels, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(rows: Array, kernels: Array, sizes: Array, interpret: bool = False) -> Array:
    """XLA for TPU has a kernel for this, but its gradient of each matrix multiplies all rows, most of them masked."""
    return lax.ragged_dot(rows, kernels, sizes)


def _forward(rows: Array, kernels: Array, sizes: Array, interpret: bool) -> tuple[Array, tuple[Array, Array, Array]]:
    return lax.ragged_dot(rows, kernels, sizes), (rows, kernels, sizes)


def _backward(interpret: bool, saved: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, None]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows, kernels, sizes = saved
    of_rows = lax.ragged_dot(gradient, kernels.swapaxes(1, 2), sizes)
    room = [(0, -len(rows) % TILE), (0, 0)]
    tiling = TILE, min(TILE, rows.shape[1]), min(TILE, gradient.shape[1])
    of_kernels = tgmm(
        jnp.pad(rows, room).swapaxes(0, 1), jnp.pad(gradient, room), sizes, kernels.dtype, tiling, interpret=interpret
    )
    return of_rows.astype(rows.dtype), of_kernels, None


_product.defvjp(_forward, _backward)
