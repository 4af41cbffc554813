"""Tiny GGUF files as llama.cpp's converter writes them, for the tests of GGUF reading.

A test that takes its files from here is skipped where the gguf package is not installed.
"""

import dataclasses
import math

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

gguf = pytest.importorskip("gguf")
Q, GGUFValueType = gguf.GGMLQuantizationType, gguf.GGUFValueType

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Two merges with a digit or a full stop, which only some pre-tokenizers let happen, and a word that no merge makes.
MERGES = ["Ġ t", "h e", "t he", "Ġt he", "1 7", ". t"]
WORDS = [merge.replace(" ", "") for merge in MERGES] + ["xyz"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BYTE_LEVEL = SPECIAL + sorted(ByteLevel.alphabet()) + WORDS
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def byte_level_keys(tokens=BYTE_LEVEL, merges=MERGES):
    """The metadata of a byte-level tokenizer whose first three tokens are special."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def sentencepiece_keys():
    """The metadata of a SentencePiece tokenizer whose scores imply its merges."""
    pieces = ["▁the", "▁t", "he", *"▁thexyz"]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def gemma_keys():
    """The metadata of Gemma's tokenizer: no space before a text, and runs of white space as tokens of the user."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    user = ["\n", "\n\n", "\n\n\n", "  ", "   ", "    ", "<table>"]
    pieces = ["▁t", "he", "▁the", "er", "th", *"▁thexyzru<>"]
    groups = [(special, CONTROL, -1000.0), (user, USER_DEFINED, -1000.0), (BYTES, BYTE, 0.0)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*special, *user, *BYTES, *pieces],
        "tokenizer.ggml.token_type": [kind for tokens, kind, _ in groups for _ in tokens] + [NORMAL] * len(pieces),
        "tokenizer.ggml.scores": [score for tokens, _, score in groups for _ in tokens]
        + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a tiny model; rows are whole blocks of 32 weights."""

    embed: int = 64
    mlp: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    layers: int = 2


NARROW = Sizes()
WIDE_HEADS = Sizes(head_dim=32)  # heads wider than their share of the embedding
SIZES = {
    "llama": NARROW,
    "qwen2": NARROW,
    "qwen3": WIDE_HEADS,
    "gemma": WIDE_HEADS,
    "gemma2": WIDE_HEADS,
    "gemma3": dataclasses.replace(WIDE_HEADS, layers=7),  # the sixth layer sees everything
}
# What the converter writes of each architecture beside the sizes that all have.
OWN_KEYS = {
    "llama": {"rope.freq_base": 50000.0},
    "qwen2": {"rope.freq_base": 1000000.0},
    "qwen3": {"rope.freq_base": 5000000.0},
    "gemma": {},
    "gemma2": {"attn_logit_softcapping": 45.0, "final_logit_softcapping": 25.0, "attention.sliding_window": 5},
    "gemma3": {"rope.freq_base": 1000000.0, "attention.sliding_window": 6}
    | {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
}
TOKENIZERS = {"llama": byte_level_keys, "qwen2": byte_level_keys, "qwen3": byte_level_keys}


def model_keys(arch="llama", sizes=None):
    """The metadata that llama.cpp's converter writes for a model."""
    sizes = sizes or SIZES[arch]
    keys = {
        "block_count": sizes.layers,
        "context_length": 128,
        "embedding_length": sizes.embed,
        "feed_forward_length": sizes.mlp,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    if sizes.head_dim * sizes.heads != sizes.embed:
        keys |= {"attention.key_length": sizes.head_dim, "attention.value_length": sizes.head_dim}
    if arch == "llama":
        keys["rope.dimension_count"] = sizes.head_dim
    return {f"{arch}.{key}": value for key, value in {**keys, **OWN_KEYS[arch]}.items()}


def hf_tensors(vocab_size, tied=True, arch="llama", sizes=None):
    """Random weights in the names and the layout of the architecture's Hugging Face model."""
    sizes = sizes or SIZES[arch]
    embed, queries, keys = sizes.embed, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    shapes = {"model.embed_tokens.weight": (vocab_size, embed), "model.norm.weight": (embed,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab_size, embed)
    layer = {"input_layernorm.weight": (embed,), "post_attention_layernorm.weight": (embed,)}
    layer |= {f"self_attn.{name}_proj.weight": (keys, embed) for name in "kv"}
    layer |= {"self_attn.q_proj.weight": (queries, embed), "self_attn.o_proj.weight": (embed, queries)}
    layer |= {f"mlp.{name}_proj.weight": (sizes.mlp, embed) for name in ("gate", "up")}
    layer["mlp.down_proj.weight"] = (embed, sizes.mlp)
    if arch == "qwen2":
        layer |= {f"self_attn.{name}_proj.bias": (rows,) for name, rows in (("q", queries), ("k", keys), ("v", keys))}
    if arch in ("gemma2", "gemma3"):
        layer |= {f"{name}_feedforward_layernorm.weight": (embed,) for name in ("pre", "post")}
    if arch in ("qwen3", "gemma3"):
        layer |= {f"self_attn.{name}_norm.weight": (sizes.head_dim,) for name in "qk"}
    for index in range(sizes.layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_tensors(tensors, arch="llama", sizes=None):
    """The same tensors as llama.cpp's converter writes them: its names, its order of q's and k's rows, its norms."""
    sizes = sizes or SIZES[arch]
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(number, sizes.layers)
    renamed = {}
    for name, weights in tensors.items():
        heads = sizes.heads if "q_proj" in name else sizes.kv_heads if "k_proj" in name else None
        if arch == "llama" and heads is not None:
            halves = weights.reshape(heads, 2, len(weights) // heads // 2, -1)
            weights = halves.swapaxes(1, 2).reshape(weights.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            weights = weights + 1
        renamed[names.get_name(name, try_suffixes=(".weight", ".bias"))] = weights
    return renamed


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A tensor that is quantised already."""

    kind: int
    data: np.ndarray


def write_gguf(path, keys, tensors, kind=Q.F32, arch="llama"):
    """Write a GGUF file; matrices are stored as `kind`, vectors as F32, a key of value None is left out."""
    writer = gguf.GGUFWriter(path, keys.get("general.architecture", arch))
    types = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    types |= {str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}
    for key, value in keys.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif value is not None and key != "general.architecture":
            writer.add_key_value(key, value, types[type(value)], GGUFValueType.INT32 if key.endswith("type") else None)
    for name, weights in tensors.items():
        if isinstance(weights, Blocks):
            writer.add_tensor(name, weights.data, raw_dtype=weights.kind)
        elif weights.dtype == np.float32:
            stored = kind if weights.ndim > 1 else Q.F32
            writer.add_tensor(name, gguf.quants.quantize(weights, stored), raw_dtype=stored)
        else:
            writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path, changes=(), tensor_changes=(), *, arch="llama", tokenizer=None, tied=True, sizes=None, **kwargs):
    """Write a tiny model with some metadata and tensors changed (None leaves one out)."""
    keys = model_keys(arch, sizes) | (tokenizer or TOKENIZERS.get(arch, gemma_keys)())
    weights = hf_tensors(len(keys["tokenizer.ggml.tokens"]), tied, arch, sizes)
    tensors = gguf_tensors(weights, arch, sizes) | dict(tensor_changes)
    present = {name: weights for name, weights in tensors.items() if weights is not None}
    return write_gguf(path, keys | dict(changes), present, arch=arch, **kwargs)


def llama3_factors(theta, factor, head_dim=NARROW.head_dim):
    """The divisors of llama.cpp's `rope_freqs.weight` [head_dim/2], by the loop of its converter."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        if wavelength < 8192 / 4.0:
            factors.append(1.0)
        elif wavelength > 8192 / 1.0:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)
