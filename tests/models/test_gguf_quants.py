"""Dequantisation against each format's own description, and against the gguf package's quantisers.

Source of the layouts: ggml's ggml-common.h; of what they mean: dequantize_row_* in ggml-quants.c.
"""

from itertools import cycle

import numpy as np
import pytest

from jaxpost.models.gguf import GGUFCheckpoint
from jaxpost.models.gguf_file import dequantize, open_gguf
from tests.models.gguf_files import (
    BYTE_LEVEL,
    Blocks,
    Q,
    Sizes,
    gguf,
    gguf_tensors,
    hf_tensors,
    write_gguf,
    write_model,
)

E32, E256 = np.arange(32), np.arange(256)  # the weights of a block


def half(block, at):
    return block[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def nibbles(codes, low):
    return np.where(low, codes & 15, codes >> 4)


def legacy(scale, minimum, codes):
    """Weight = scale * code + minimum, with one of each for a block of 32."""
    return scale * codes.astype(np.float32) + minimum


def q8_0(block):
    return legacy(half(block, 0), 0, block[:, 2:].view(np.int8))


def q4_0(block):
    return legacy(half(block, 0), 0, nibbles(block[:, 2 + E32 % 16], E32 < 16).astype(np.int32) - 8)


def q4_1(block):
    return legacy(half(block, 0), half(block, 2), nibbles(block[:, 4 + E32 % 16], E32 < 16))


def fifth_bits(block, at):
    return (block[:, at + E32 // 8] >> (E32 % 8)) & 1


def q5_0(block):
    codes = nibbles(block[:, 6 + E32 % 16], E32 < 16) + 16 * fifth_bits(block, 2).astype(np.int32) - 16
    return legacy(half(block, 0), 0, codes)


def q5_1(block):
    codes = nibbles(block[:, 8 + E32 % 16], E32 < 16) + 16 * fifth_bits(block, 4)
    return legacy(half(block, 0), half(block, 2), codes)


def two_bits(block, at):
    """Four weights a byte, 32 bytes apart in each half of the block."""
    return (block[:, at + 32 * (E256 // 128) + E256 % 32] >> (2 * (E256 % 128 // 32))) & 3


def q2_k(block):
    scales = block[:, E256 // 16]
    return half(block, 80) * (scales & 15) * two_bits(block, 16) - half(block, 82) * (scales >> 4)


def q3_k(block):
    group = E256 // 16
    low = nibbles(block[:, 96 + group % 8], group < 8)
    high = (block[:, 104 + group % 4] >> (2 * (group // 4))) & 3
    scales = (low | high << 4).astype(np.float32) - 32
    absent = ~(block[:, E256 % 32] >> (E256 // 32)) & 1
    return half(block, 108) * scales * (two_bits(block, 32).astype(np.float32) - 4 * absent)


def six_bit_scales(block):
    """The scale and the minimum of each 32 weights: the first four of each whole, the others split over the rest."""
    packed, group = block[:, 4:16], E256 // 32
    first, second, third = (packed[:, start + group % 4] for start in (0, 4, 8))
    scales = np.where(group < 4, first & 63, (third & 15) | (first >> 6) << 4)
    minima = np.where(group < 4, second & 63, (third >> 4) | (second >> 6) << 4)
    return half(block, 0) * scales, half(block, 2) * minima


def four_bits(block, at):
    return nibbles(block[:, at + 32 * (E256 // 64) + E256 % 32], E256 % 64 < 32)


def q4_k(block):
    scales, minima = six_bit_scales(block)
    return scales * four_bits(block, 16) - minima


def q5_k(block):
    scales, minima = six_bit_scales(block)
    high = (block[:, 16 + E256 % 32] >> (E256 // 32)) & 1
    return scales * (four_bits(block, 48) + 16 * high) - minima


def q6_k(block):
    low = nibbles(block[:, 64 * (E256 // 128) + E256 % 64], E256 % 128 < 64)
    codes = (low | two_bits(block, 128) << 4).astype(np.float32) - 32
    return half(block, 208) * block[:, 192 + E256 // 16].view(np.int8) * codes


def float32(block):
    return block.copy().view(np.float32)


def float16(block):
    return half(block, 0)


def bfloat16(block):
    return np.hstack([np.zeros_like(block), block]).view(np.float32)  # the upper half of a float32


# Each type's meaning and the places of its half-precision scales.
MEANING = {
    Q.F32: (float32, ()),
    Q.F16: (float16, ()),
    Q.BF16: (bfloat16, ()),
    Q.Q8_0: (q8_0, (0,)),
    Q.Q4_0: (q4_0, (0,)),
    Q.Q4_1: (q4_1, (0, 2)),
    Q.Q5_0: (q5_0, (0,)),
    Q.Q5_1: (q5_1, (0, 2)),
    Q.Q2_K: (q2_k, (80, 82)),
    Q.Q3_K: (q3_k, (108,)),
    Q.Q4_K: (q4_k, (0, 2)),
    Q.Q5_K: (q5_k, (0, 2)),
    Q.Q6_K: (q6_k, (208,)),
}


def random_blocks(kind, shape, seed=0):
    """A tensor of any codes and of scales that are numbers, as [rows, bytes]."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if block == 1:
        return gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), kind).view(np.uint8)
    data = rng.integers(0, 256, (shape[0] * shape[1] // block, size), np.uint8)
    for at in MEANING[kind][1]:
        data[:, at : at + 2] = rng.normal(size=(len(data), 1)).astype(np.float16).view(np.uint8)
    return data.reshape(shape[0], -1)


def meaning(kind, data):
    """The weights [rows, columns] of a tensor."""
    blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    return MEANING[kind][0](blocks).astype(np.float32).reshape(len(data), -1)


@pytest.mark.parametrize("kind", MEANING, ids=lambda kind: kind.name)
def test_any_codes_have_the_meaning_of_their_format(tmp_path, kind):
    data = random_blocks(kind, (6, 512))
    _, tensors = open_gguf(write_gguf(tmp_path / "m.gguf", {}, {"t": Blocks(kind, data)}))
    assert tensors["t"].shape == (6, 512)
    np.testing.assert_array_equal(dequantize(tensors["t"]), meaning(kind, data))


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1], ids=lambda kind: kind.name)
def test_quantised_weights_are_those_weights_to_half_a_step(tmp_path, kind):
    weights = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    _, tensors = open_gguf(write_gguf(tmp_path / "m.gguf", {}, {"t": weights}, kind=kind))
    blocks = weights.reshape(-1, 32)
    largest = np.abs(blocks).max(1, keepdims=True)
    width = 2 * largest if kind in (Q.Q8_0, Q.Q4_0, Q.Q5_0) else np.ptp(blocks, axis=1, keepdims=True)
    step = width / {Q.Q8_0: 254, Q.Q4_0: 16, Q.Q4_1: 15, Q.Q5_0: 32, Q.Q5_1: 31}[kind]
    error = np.abs(dequantize(tensors["t"]).reshape(-1, 32) - blocks)
    # The formats centred on zero lose up to a whole step at the end that has no code; scales are half precision.
    assert (error <= (1.0 if kind in (Q.Q4_0, Q.Q5_0) else 0.5) * step + 1e-3 * largest).all()
    assert error.max() > 0.2 * step.min()


def test_a_model_may_mix_its_types(tmp_path):
    sizes = Sizes(embed=256, mlp=512, head_dim=64)
    tensors = gguf_tensors(hf_tensors(len(BYTE_LEVEL), sizes=sizes), sizes=sizes)
    kinds = dict(zip((name for name, weights in tensors.items() if weights.ndim == 2), cycle(MEANING), strict=False))
    data = {name: random_blocks(kind, tensors[name].shape, seed) for seed, (name, kind) in enumerate(kinds.items())}
    blocks = {name: Blocks(kinds[name], rows) for name, rows in data.items()}
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", tensor_changes=blocks, sizes=sizes))
    assert set(kinds.values()) == set(MEANING)
    theirs = {gguf_name: name for name, gguf_name in zip(hf_tensors(1, sizes=sizes), tensors, strict=True)}
    for name, kind in kinds.items():
        expected = meaning(kind, data[name])
        heads = {"attn_q": sizes.heads, "attn_k": sizes.kv_heads}.get(name.split(".")[-2])
        if heads:
            pairs = expected.reshape(heads, sizes.head_dim // 2, 2, -1)  # row 2i is the i-th of the first half
            expected = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(expected.shape)
        np.testing.assert_array_equal(checkpoint.read(theirs[name]), expected, err_msg=name)
