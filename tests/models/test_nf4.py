"""Matrices in few bits: what is stored of them, in how many bytes, and how near they come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.models.nf4 import LEVELS, dequantize_int8, dequantize_nf4, quantize_int8, quantize_nf4
from jaxpost.models.quant import SCHEMES


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(64, 1), (2, 3, 192, 300), (32, 64), (96, 40)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_shape_comes_back(shape, scheme):
    kernel = random(*shape)
    run, back_to = jax.jit(SCHEMES[scheme].quantize), jax.jit(SCHEMES[scheme].dequantize, static_argnums=1)
    parts = run(kernel)
    for dtype in ("float32", "bfloat16"):
        back = back_to(parts, dtype)
        assert back.shape == shape and back.dtype == dtype
        error = np.linalg.norm(back.astype(np.float32) - kernel) / np.linalg.norm(kernel)
        assert error < (0.012 if scheme == "int8" else 0.11)
    last = tuple(dim - 1 for dim in shape[:-2])
    for name, part in run(kernel[last]).items():  # a stack is its kernels
        np.testing.assert_allclose(parts[name][last], part, rtol=1e-6)


def test_bytes_a_weight():
    def of(scheme, *shape):
        kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
        parts = jax.eval_shape(SCHEMES[scheme].quantize, kernel)
        return sum(part.size * part.dtype.itemsize for part in parts.values()) / kernel.size

    assert of("nf4", 2, 1024, 512) == 0.5 + 1 / 64 + 8 / (64 * 256) < 0.5162
    assert of("nf4_plain", 2, 1024, 512) == 0.5625
    assert of("int8", 2, 1024, 512) == 1 + 4 / 1024
    for num_outputs in (64, 192, 257, 300, 14336):  # the last group may be small
        assert of("nf4", 4096, num_outputs) <= 0.53


def test_levels_and_their_places_in_the_bytes():
    column = np.resize(LEVELS, 64).astype(np.float32)
    kernel = jnp.asarray(np.stack([column, 3 * column[::-1], 0 * column], axis=1))
    parts = quantize_nf4(kernel, nested=False)
    codes = np.resize(np.arange(16), 64)
    np.testing.assert_array_equal(parts["codes"][0, :, 0], codes[:32] << 4 | codes[32:])
    np.testing.assert_array_equal(parts["absmax"], [[1, 3, 0]])
    np.testing.assert_array_equal(dequantize_nf4(parts, "float32"), kernel)
    np.testing.assert_allclose(dequantize_nf4(quantize_nf4(kernel), "float32"), kernel, rtol=1e-6)


def test_blocks_of_any_size_stand_side_by_side():
    """Outputs of 1e-4 beside those of 1, none beside all: each block keeps its own relative error."""
    scales = np.repeat([1, 1e-4, 0, 1e-2], 64).astype(np.float32)
    kernel = random(128, 256) * scales
    back = np.asarray(dequantize_nf4(quantize_nf4(jnp.asarray(kernel)), "float32"))
    lengths = np.linalg.norm(kernel, axis=0)
    errors = np.linalg.norm(back - kernel, axis=0)
    assert np.all(errors <= 0.13 * lengths) and np.all(errors[scales == 0] == 0)
    zeros = quantize_nf4(jnp.zeros((64, 3)))
    np.testing.assert_array_equal(dequantize_nf4(zeros, "float32"), np.zeros((64, 3)))


def test_int8_is_within_half_a_step_of_each_output():
    kernel = random(100, 7) * np.array([1, 10, 0.1, 0, 1, 1, 1], np.float32)
    parts = quantize_int8(jnp.asarray(kernel))
    steps = np.abs(kernel).max(axis=0) / 127
    np.testing.assert_allclose(parts["scale"], steps, rtol=1e-6)
    assert np.all(np.abs(dequantize_int8(parts, "float32") - kernel) <= 0.5001 * steps)


def test_an_odd_number_of_inputs_has_no_place_in_4_bits():
    with pytest.raises(ConfigError, match=r"a kernel with 33 inputs, an odd number, .*; load_in_8bit can"):
        quantize_nf4(jnp.ones((33, 4)))
    assert dequantize_int8(quantize_int8(jnp.ones((33, 4))), "float32").shape == (33, 4)
