"""Products of groups of rows with a matrix each, in Pallas for GPUs: no row meets a matrix that is not its own.

XLA on GPUs multiplies all rows with all matrices and leaves out what is not wanted. Tiles here begin where groups
begin, and the last of a group is filled up with nothing.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

ROWS = 64  # of a tile
WIDTHS = (128, 64, 32, 16)  # inputs, and outputs, of a tile: the largest that divides them


def fits(kernels: Any) -> bool:
    """Whether there are tiles for matrices [E, in, out] of this shape and dtype."""
    return kernels.dtype.itemsize == 2 and all(dim % WIDTHS[-1] == 0 for dim in kernels.shape[1:])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(
    rows: Float[Array, "N in"], kernels: Float[Array, "E in out"], sizes: Int[Array, "E"], interpret: bool = False
) -> Float[Array, "N out"]:
    """Each row times the matrix of its group; rows beyond the last group are left as they are found."""
    return _multiplied(rows, kernels, sizes, transposed=False, interpret=interpret)


def _forward(rows: Array, kernels: Array, sizes: Array, interpret: bool) -> tuple[Array, tuple[Array, Array, Array]]:
    return _multiplied(rows, kernels, sizes, transposed=False, interpret=interpret), (rows, kernels, sizes)


def _backward(interpret: bool, saved: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, None]:
    rows, kernels, sizes = saved
    of_rows = _multiplied(gradient, kernels, sizes, transposed=True, interpret=interpret)
    return of_rows, _summed(rows, gradient, sizes, kernels.dtype, interpret=interpret), None


product.defvjp(_forward, _backward)


def _tiles(sizes: Int[Array, "E"], num_rows: int) -> Int[Array, "tiles 3"]:
    """Of each tile: its group, its first row, and where the group ends; those that are not needed have no rows."""
    ends, counts = jnp.cumsum(sizes), -(-sizes // ROWS)
    number, last = jnp.arange(num_rows // ROWS + len(sizes)), jnp.cumsum(counts)
    group = jnp.minimum(jnp.searchsorted(last, number, side="right"), len(sizes) - 1)
    start = (ends - sizes)[group] + (number - (last - counts)[group]) * ROWS
    stop = jnp.where(number < last[-1], ends[group], 0)
    return jnp.stack([group, jnp.minimum(start, num_rows), stop], axis=1).astype(jnp.int32)


def _multiplied(rows: Array, kernels: Array, sizes: Array, *, transposed: bool, interpret: bool) -> Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as library

    in_dim, out_dim = kernels.shape[1:][:: -1 if transposed else 1]
    inner, outer = _width(in_dim), _width(out_dim)

    def kernel(tiles: Any, rows: Any, kernels: Any, out: Any) -> None:
        group, start, stop = (tiles[pl.program_id(0), part] for part in range(3))
        own = (start + jnp.arange(ROWS) < stop)[:, None]
        place, columns = pl.ds(start, ROWS), pl.ds(pl.program_id(1) * outer, outer)

        def add(number: Array, total: Array) -> Array:
            inputs = pl.ds(number * inner, inner)
            left = library.load(rows.at[place, inputs], mask=own, other=0.0)
            right = kernels[group, columns, inputs] if transposed else kernels[group, inputs, columns]
            return total + library.dot(left, right, trans_b=transposed).astype(jnp.float32)

        @pl.when(start < stop)
        def _() -> None:
            total = lax.fori_loop(0, in_dim // inner, add, jnp.zeros((ROWS, outer), jnp.float32))
            library.store(out.at[place, columns], total.astype(out.dtype), mask=own)

    tiles = _tiles(sizes, len(rows))
    return pl.pallas_call(
        kernel,
        grid=(len(tiles), out_dim // outer),
        out_shape=jax.ShapeDtypeStruct((len(rows), out_dim), rows.dtype),
        compiler_params=library.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_rows",
    )(tiles, rows, kernels)


def _summed(rows: Array, gradient: Array, sizes: Array, dtype: Any, *, interpret: bool) -> Array:
    """Of each group, the product of its rows with its gradients: [E, in, out]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as library

    in_dim, out_dim = rows.shape[1], gradient.shape[1]
    tall, wide = _width(in_dim), _width(out_dim)

    def kernel(bounds: Any, rows: Any, gradient: Any, out: Any) -> None:
        group = pl.program_id(0)
        start, stop = bounds[group, 0], bounds[group, 1]
        inputs, columns = pl.ds(pl.program_id(1) * tall, tall), pl.ds(pl.program_id(2) * wide, wide)

        def add(number: Array, total: Array) -> Array:
            first = start + number * ROWS
            own = (first + jnp.arange(ROWS) < stop)[:, None]
            left = library.load(rows.at[pl.ds(first, ROWS), inputs], mask=own, other=0.0)
            right = library.load(gradient.at[pl.ds(first, ROWS), columns], mask=own, other=0.0)
            return total + library.dot(left, right, trans_a=True).astype(jnp.float32)

        count = lax.div(stop - start + ROWS - 1, ROWS)
        total = lax.fori_loop(0, count, add, jnp.zeros((tall, wide), jnp.float32))
        out[group, inputs, columns] = total.astype(dtype)

    ends = jnp.cumsum(sizes)
    return pl.pallas_call(
        kernel,
        grid=(len(sizes), in_dim // tall, out_dim // wide),
        out_shape=jax.ShapeDtypeStruct((len(sizes), in_dim, out_dim), dtype),
        compiler_params=library.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_kernels",
    )(jnp.stack([ends - sizes, ends], axis=1).astype(jnp.int32), rows, gradient)


def _width(dim: int) -> int:
    return next(width for width in WIDTHS if dim % width == 0)
