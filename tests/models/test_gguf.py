"""GGUF files as checkpoints: names, layout and config, and what is refused. Other tests take their files from here."""

import math

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFValueType
from tokenizers.pre_tokenizers import ByteLevel

from jaxpost.errors import ConfigError
from jaxpost.models.gguf import GGUFCheckpoint

EMBED, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Two merges with a digit or a full stop, which only some pre-tokenizers let happen, and a word that no merge makes.
MERGES = ["Ġ t", "h e", "t he", "Ġt he", "1 7", ". t"]
WORDS = [merge.replace(" ", "") for merge in MERGES] + ["xyz"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BYTE_LEVEL = SPECIAL + sorted(ByteLevel.alphabet()) + WORDS


def byte_level_keys(tokens=BYTE_LEVEL, merges=MERGES):
    """The metadata of a byte-level tokenizer whose first three tokens are special."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
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
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def model_keys():
    """The metadata that llama.cpp's converter writes for a llama model."""
    return {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": EMBED,
        "llama.feed_forward_length": MLP,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 50000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HEAD_DIM,
    }


def hf_tensors(vocab_size, tied=True):
    """Random weights in the names and the layout of Hugging Face's Llama."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocab_size, EMBED), "model.norm.weight": (EMBED,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab_size, EMBED)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + "input_layernorm.weight": (EMBED,), prefix + "post_attention_layernorm.weight": (EMBED,)}
        shapes[prefix + "self_attn.q_proj.weight"] = (HEADS * HEAD_DIM, EMBED)
        shapes[prefix + "self_attn.k_proj.weight"] = (KV_HEADS * HEAD_DIM, EMBED)
        shapes[prefix + "self_attn.v_proj.weight"] = (KV_HEADS * HEAD_DIM, EMBED)
        shapes[prefix + "self_attn.o_proj.weight"] = (EMBED, HEADS * HEAD_DIM)
        shapes |= {prefix + f"mlp.{name}_proj.weight": (MLP, EMBED) for name in ("gate", "up")}
        shapes[prefix + "mlp.down_proj.weight"] = (EMBED, MLP)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_tensors(tensors):
    """The same tensors as llama.cpp's converter writes them: its names, its row order of q and k."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    renamed = {}
    for name, weights in tensors.items():
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
        if heads is not None:
            halves = weights.reshape(heads, 2, len(weights) // heads // 2, -1)
            weights = halves.swapaxes(1, 2).reshape(weights.shape)
        renamed[names.get_name(name, try_suffixes=(".weight",))] = weights
    return renamed


def write_gguf(path, keys, tensors, kind=Q.F32, arch="llama"):
    """Write a GGUF file; matrices are stored as `kind`, vectors as F32, a key of value None is left out."""
    writer = gguf.GGUFWriter(path, arch)
    types = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    types |= {str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}
    for key, value in keys.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif value is not None:
            writer.add_key_value(key, value, types[type(value)], GGUFValueType.INT32 if key.endswith("type") else None)
    for name, weights in tensors.items():
        stored = kind if weights.ndim > 1 else Q.F32
        if weights.dtype == np.float32:
            writer.add_tensor(name, gguf.quants.quantize(weights, stored), raw_dtype=stored)
        else:
            writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_llama(path, changes=(), tensor_changes=(), tokenizer=None, tied=True, **kwargs):
    """Write a tiny llama model with some metadata and tensors changed (None leaves one out)."""
    keys = model_keys() | (tokenizer or byte_level_keys())
    tensors = gguf_tensors(hf_tensors(len(keys["tokenizer.ggml.tokens"]), tied)) | dict(tensor_changes)
    present = {name: weights for name, weights in tensors.items() if weights is not None}
    return write_gguf(path, keys | dict(changes), present, **kwargs)


def llama3_factors(theta, factor):
    """The divisors of llama.cpp's `rope_freqs.weight` [head_dim/2], by the loop of its converter."""
    factors = []
    for index in range(0, HEAD_DIM, 2):
        wavelength = 2 * math.pi * theta ** (index / HEAD_DIM)
        if wavelength < 8192 / 4.0:
            factors.append(1.0)
        elif wavelength > 8192 / 1.0:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1], ids=lambda kind: kind.name)
def test_tensors_come_back_in_hf_layout(tmp_path, kind):
    checkpoint = GGUFCheckpoint(write_llama(tmp_path / "m.gguf", kind=kind))
    tensors = hf_tensors(len(BYTE_LEVEL))
    assert checkpoint.names() == tensors.keys()
    for name, weights in tensors.items():
        stored = kind if weights.ndim > 1 else Q.F32
        # Quantisation works on rows, so reordering rows commutes with it: the result is exact.
        expected = gguf.quants.dequantize(gguf.quants.quantize(weights, stored), stored)
        read = checkpoint.read(name)
        assert read.dtype == np.float32 and type(read) is np.ndarray and read.flags.writeable
        assert checkpoint.shape(name) == read.shape == weights.shape
        np.testing.assert_array_equal(read, expected, err_msg=name)


def test_config_is_the_hf_config(tmp_path):
    checkpoint = GGUFCheckpoint(write_llama(tmp_path / "m.gguf"))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert checkpoint.generation_config == ids
    assert checkpoint.config == ids | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": EMBED,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": len(BYTE_LEVEL),
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
    }


def test_what_the_file_leaves_out_has_llama_cpps_meaning(tmp_path):
    absent = ["llama.attention.head_count_kv", "llama.rope.freq_base", "llama.rope.dimension_count"]
    absent += [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "padding")]
    wide = {
        f"blk.{layer}.attn_{name}.weight": np.zeros((HEADS * HEAD_DIM, EMBED), np.float32)
        for layer in range(LAYERS)
        for name in "kv"
    }
    checkpoint = GGUFCheckpoint(write_llama(tmp_path / "m.gguf", dict.fromkeys(absent), wide))
    assert checkpoint.config["num_key_value_heads"] == HEADS
    assert checkpoint.config["rope_theta"] == 10000.0 and checkpoint.config["head_dim"] == HEAD_DIM
    assert checkpoint.config["bos_token_id"] is None and checkpoint.config["pad_token_id"] is None
    assert checkpoint.generation_config == {"eos_token_id": 2}


def test_an_output_matrix_means_untied_embeddings(tmp_path):
    checkpoint = GGUFCheckpoint(write_llama(tmp_path / "m.gguf", tied=False))
    assert checkpoint.config["tie_word_embeddings"] is False
    expected = hf_tensors(len(BYTE_LEVEL), tied=False)["lm_head.weight"]
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), expected)


@pytest.mark.parametrize(
    ("changes", "factors", "expected"),
    [
        ({"type": "none", "factor": 1.0}, None, None),
        ({"type": "linear", "factor": 2.5}, None, {"rope_type": "linear", "factor": 2.5}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
            None,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
        (
            {},
            llama3_factors(50000.0, 32.0),
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
    ids=["none", "linear", "yarn", "llama3"],
)
def test_rope_scaling(tmp_path, changes, factors, expected):
    changes = {f"llama.rope.scaling.{key}": value for key, value in changes.items()}
    checkpoint = GGUFCheckpoint(write_llama(tmp_path / "m.gguf", changes, {"rope_freqs.weight": factors}))
    assert checkpoint.config.get("rope_scaling") == expected
    assert checkpoint.names() == hf_tensors(1).keys()


REFUSED = {
    "architecture": (dict(arch="mamba"), r"architecture 'mamba' is not supported \(supported: llama\)"),
    "missing key": (dict(changes={"llama.block_count": None}), "has no llama.block_count"),
    "wrong type": (dict(changes={"llama.block_count": "two"}), "llama.block_count is 'two'.*not of type int"),
    "per-layer heads": (dict(changes={"llama.attention.head_count": [4, 4]}), "head_count is .*not of type int"),
    "zero": (dict(changes={"llama.embedding_length": 0}), "llama.embedding_length is 0"),
    "too many layers": (dict(changes={"llama.block_count": 2**31 - 1}), "2147483647 layers are announced"),
    "heads": (dict(changes={"llama.attention.head_count_kv": 3}), "4 heads cannot share 3"),
    "partial rotary": (dict(changes={"llama.attention.key_length": 32}), "keys 32, values 32, rotary 16"),
    "experts": (dict(changes={"llama.expert_count": 8}), "llama.expert_count may change"),
    "longrope": (dict(changes={"llama.rope.scaling.type": "longrope"}), "'longrope' is not supported"),
    "other factors": (
        dict(tensor_changes={"rope_freqs.weight": llama3_factors(10000.0, 8.0)[::-1].copy()}),
        "rope_freqs.weight holds other factors",
    ),
    "part": (dict(changes={"split.count": 3}), "one part of several.*llama-gguf-split"),
    "missing tensor": (dict(tensor_changes={"blk.1.ffn_up.weight": None}), "blk.1.ffn_up.weight is missing"),
    "no embedding": (dict(tensor_changes={"token_embd.weight": None}), "token_embd.weight is missing"),
    "extra tensor": (
        dict(tensor_changes={"blk.0.attn_q.bias": np.zeros(EMBED, np.float32)}),
        "blk.0.attn_q.bias has no place in a llama model",
    ),
    "shape": (
        dict(tensor_changes={"blk.0.ffn_up.weight": np.zeros((MLP, 2 * EMBED), np.float32)}),
        r"blk.0.ffn_up.weight has shape \(96, 128\), its metadata says \(96, 64\)",
    ),
    "vocabulary": (
        dict(changes={"tokenizer.ggml.tokens": BYTE_LEVEL[:-1]}),
        f"different sizes: {len(BYTE_LEVEL)} rows.* {len(BYTE_LEVEL) - 1} in tokenizer.ggml.tokens",
    ),
    "stated vocabulary": (dict(changes={"llama.vocab_size": 7}), "different sizes.* 7 in llama.vocab_size"),
    "token id": (dict(changes={"tokenizer.ggml.eos_token_id": 999}), "eos_token_id is 999, outside of the vocabulary"),
    "quantisation": (
        dict(tensor_changes={"output_norm.weight": np.zeros(EMBED, np.float64)}),
        "output_norm.weight has quantisation type F64, which the gguf package cannot dequantise",
    ),
}


@pytest.mark.parametrize(("kwargs", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_faithfully_is_refused(tmp_path, kwargs, message):
    path = write_llama(tmp_path / "m.gguf", **kwargs)
    with pytest.raises(ConfigError, match=message) as caught:
        GGUFCheckpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
