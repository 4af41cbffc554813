"""The product of activations with a kernel, as the platform multiplies it fastest.

On CPU XLA multiplies bfloat16 natively (AVX512-BF16, AMX) only where the result is float32 and the left matrix is laid
out row by row. Any other product it converts to float32 before, which takes two to four times as long; so the gradient
of a kernel, whose left matrix is the transposed activations, has these written anew, and a tied head is not transposed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import BFloat16, Float

from jaxpost.platform import platform

RESULT = "product"  # checkpoint name of what a native product gives
ROWS = Layout(major_to_minor=(0, 1))


def product(
    x: Float[Array, "*rows in"], kernel: Float[Array, "..."], dtype: Any = None, *, turned: bool = False
) -> Float[Array, "*rows out"]:
    """x @ kernel, summed in float32.

    Args:
        x: the inputs.
        kernel: [in, out], in the dtype of x.
        dtype: of the result; by default that of x.
        turned: the kernel is [out, in].
    """
    if x.ndim == 2 and x.dtype == kernel.dtype == jnp.bfloat16 and platform() == "cpu":
        return _native(jnp.dtype(dtype or x.dtype), turned, x, kernel)
    return jnp.matmul(x, kernel.T if turned else kernel, preferred_element_type=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _native(dtype: Any, turned: bool, x: BFloat16[Array, "N in"], kernel: BFloat16[Array, "..."]) -> Array:
    return _multiplied(x, kernel, contracted=int(turned)).astype(dtype)


def _forward(dtype: Any, turned: bool, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return kept(_native(dtype, turned, x, kernel), RESULT), (x, kernel)


def _backward(dtype: Any, turned: bool, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """A float32 gradient is rounded before it is multiplied, as TPUs do by default."""
    x, kernel = saved
    gradient = gradient.astype(x.dtype)
    left, right = (gradient, x) if turned else (x, gradient)
    of_x, of_kernel = (
        _multiplied(gradient, kernel, contracted=int(not turned)),
        _multiplied(left.T, right, contracted=0),
    )
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


_native.defvjp(_forward, _backward)


def _multiplied(left: BFloat16[Array, "N K"], right: BFloat16[Array, "..."], *, contracted: int) -> Float[Array, "N M"]:
    """The left matrix's columns contracted with a dimension of the right one; float32."""
    left = with_layout_constraint(left, ROWS)
    return lax.dot_general(left, right, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32)


def kept(y: Array, name: str) -> Array:
    """`checkpoint_name(y, name)` for the forward rule of a custom_vjp.

    What is kept of a scan over layers is stacked. XLA on CPU writes a stack of bfloat16 anew, all of it and through
    float32, for each layer that it puts in; one of integers it writes in place.
    """
    if y.dtype != jnp.bfloat16 or platform() != "cpu":
        return checkpoint_name(y, name)
    return lax.bitcast_convert_type(checkpoint_name(lax.bitcast_convert_type(y, jnp.uint16), name), jnp.bfloat16)
