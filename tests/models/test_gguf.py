"""GGUF files as checkpoints: layout, config, tokenizer, and what damaged files do."""

import json
import math
import random
import struct
import subprocess
import sys

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
        if value is not None:
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


def encode(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


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


def header(num_tensors, num_keys, body=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + body


def string(text):
    return struct.pack("<Q", len(text)) + text


def tensor_entry(dims, kind=0, offset=0):
    return string(b"t") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ENDLESS_ARRAY = string(b"key") + struct.pack("<IIQ", 9, 0, 2**62)
DAMAGED = {
    "empty": (b"", "not a readable GGUF file"),
    "text": (b"<!DOCTYPE html>" * 10, "does not start with the letters GGUF"),
    "only the magic": (b"GGUF", "inside of its header"),
    "big endian": (header(0, 0, version=3 << 24), "format version 50331648"),
    "endless array": (header(0, 1, ENDLESS_ARRAY), "announces 4611686018427387904 values"),
    "array beyond the end": (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 10, 1000)), "inside of its header"),
    "nested arrays": (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 9, 1)), "unknown type 9"),
    "endless string": (header(0, 1, struct.pack("<Q", 2**64 - 1)), "inside of its header"),
    "many keys": (header(0, 2**63), "inside of its header"),
    "many tensors": (header(2**63, 0), "announces 9223372036854775808 tensors"),
    "many dimensions": (header(1, 0, string(b"t") + struct.pack("<I", 2**31)), "2147483648 dimensions"),
    "overflowing size": (header(1, 0, tensor_entry([2**32, 2**32])), "tensor t lies beyond the end of the file"),
    "far offset": (header(1, 0, tensor_entry([1], offset=2**40)), "tensor t lies beyond the end of the file"),
    "unknown quantisation": (header(1, 0, tensor_entry([1], kind=77)), "quantisation type 77"),
    "not UTF-8": (header(0, 1, string(b"\xff\xfe") + struct.pack("<IB", 0, 1)), "not a readable GGUF file"),
    "no architecture": (header(0, 0), "no general.architecture"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_header_is_refused_with_its_reason(tmp_path, content, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        GGUFCheckpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_that_is_no_file_is_refused(tmp_path):
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            GGUFCheckpoint(path)


def test_an_incomplete_download_is_refused_at_any_length(tmp_path):
    content = write_llama(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "part.gguf"
    for length in [*range(0, 200, 7), *range(200, len(content), 9973), len(content) - 40]:
        path.write_bytes(content[:length])
        with pytest.raises(ConfigError, match="not a readable GGUF file"):
            GGUFCheckpoint(path)


def mutants(content, header_size, count, seed):
    """Yield copies of `content` with one to four bytes of the header changed, often to an extreme value."""
    rng = random.Random(seed)
    for _ in range(count):
        mutant = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            mutant[rng.randrange(header_size)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        yield bytes(mutant)


def small_keys():
    """Tokenizer metadata that is small beside the rest of the header, so that mutations hit everything."""
    return byte_level_keys([*SPECIAL, *"abcdef", "ab", "abc"], ["a b", "ab c"])


@pytest.mark.parametrize("tokenizer", [small_keys(), sentencepiece_keys()], ids=["gpt2", "llama"])
def test_mutated_files_read_or_raise_config_error(tmp_path, tokenizer):
    content = write_llama(tmp_path / "m.gguf", tokenizer=tokenizer).read_bytes()
    header_size = gguf.GGUFReader(tmp_path / "m.gguf").data_offset
    path, refused = tmp_path / "mutant.gguf", 0
    for mutant in mutants(content, header_size, 100, seed=0):
        path.write_bytes(mutant)
        try:
            checkpoint = GGUFCheckpoint(path)
            for name in checkpoint.names():
                assert checkpoint.read(name).shape == checkpoint.shape(name)
            checkpoint.tokenizer()("abc def")
        except ConfigError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert 20 < refused < 100


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    path = write_llama(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxpost\[gguf\]'"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("pre", "digits", "stop", "word"),
    [
        ("smollm", ["1", "7"], [".", "t"], ["x", "y", "z"]),
        ("gpt-2", ["17"], [".", "t"], ["x", "y", "z"]),
        ("default", ["17"], [".", "t"], ["x", "y", "z"]),
        ("qwen2", ["1", "7"], [".t"], ["x", "y", "z"]),
        ("llama-bpe", ["17"], [".t"], ["xyz"]),
    ],
)
def test_each_pre_tokenizer_cuts_its_own_way(tmp_path, pre, digits, stop, word):
    changes = {"tokenizer.ggml.pre": pre}
    tokenizer = GGUFCheckpoint(write_llama(tmp_path / "m.gguf", changes)).tokenizer()
    assert encode(tokenizer, "17") == digits
    assert encode(tokenizer, ".t") == stop
    assert encode(tokenizer, "xyz") == word
    assert encode(tokenizer, "the the") == ["the", "Ġthe"]
    assert (tokenizer("t")["input_ids"][0] == 1) == (pre == "llama-bpe")  # Llama 3 starts with BOS, the others do not


TEXTS = [
    "Hello, world! It's 1984 and 3.14159 < 22/7.",
    "  two leading spaces, a tab\t, CRLF\r\n and \n\n\n newlines  ",
    "emoji 🤗👩‍👩‍👧 flags 🇯🇵, naïve café, 漢字かな交じり, العربية, ½²Ⅷ",
    "def f(x):\n    return x ** 2  # code",
    "<|im_start|>user\nhi 42<|im_end|>\n",
    "",
]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_text_survives_the_round_trip(tmp_path, pre):
    tokenizer = GGUFCheckpoint(write_llama(tmp_path / "m.gguf", {"tokenizer.ggml.pre": pre})).tokenizer()
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_are_single_ids(tmp_path):
    kinds = [3, 3, 3] + [1] * (len(BYTE_LEVEL) - 4) + [4]  # "xyz" is user-defined: whole, but not special
    tokenizer = GGUFCheckpoint(write_llama(tmp_path / "m.gguf", {"tokenizer.ggml.token_type": kinds})).tokenizer()
    assert tokenizer("<|im_start|>a<|im_end|>")["input_ids"] == [1, BYTE_LEVEL.index("a"), 2]
    assert encode(tokenizer, "xxyz") == ["x", "xyz"]
    assert tokenizer.decode([1, BYTE_LEVEL.index("xyz"), 2], skip_special_tokens=True) == "xyz"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token == "<|endoftext|>" and len(tokenizer) == len(BYTE_LEVEL)
    assert tokenizer.model_max_length == 128
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert rendered == "<|im_start|>user\nthe<|im_end|>\n"


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_bos_and_eos_frame_the_text_if_the_file_says_so(tmp_path, bos, eos):
    changes = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    tokenizer = GGUFCheckpoint(write_llama(tmp_path / "m.gguf", changes)).tokenizer()
    assert tokenizer("the")["input_ids"] == [1] * bos + [BYTE_LEVEL.index("the")] + [2] * eos
    pair = tokenizer("the", "the")
    assert pair["input_ids"] == 2 * ([1] * bos + [BYTE_LEVEL.index("the")] + [2] * eos)


def test_sentencepiece_follows_the_scores_and_falls_back_to_bytes(tmp_path):
    tokenizer = GGUFCheckpoint(write_llama(tmp_path / "m.gguf", tokenizer=sentencepiece_keys())).tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("the hex")["input_ids"]) == ["<s>", "▁the", "▁", "he", "x"]
    assert encode(tokenizer, "é") == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("the hex", "é 🤗 x\n17", " the", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    changes = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    bare = GGUFCheckpoint(write_llama(tmp_path / "b.gguf", changes, tokenizer=sentencepiece_keys())).tokenizer()
    assert encode(bare, "the") == ["t", "he"]
    assert bare.decode(bare(" the")["input_ids"]) == " the"


RELOAD = """
import json, sys
sys.modules["torch"] = None  # as if it were not installed: importing it anywhere fails
from jaxpost.models.gguf import GGUFCheckpoint
source, folder, texts, messages = json.loads(sys.argv[1])
built = GGUFCheckpoint(source).tokenizer()
built.save_pretrained(folder)
from transformers import AutoTokenizer
loaded = AutoTokenizer.from_pretrained(folder)
for text in texts:
    assert built(text)["input_ids"] == loaded(text)["input_ids"], text
    assert built.decode(built(text)["input_ids"]) == loaded.decode(loaded(text)["input_ids"]), text
assert built.chat_template == loaded.chat_template
assert built.apply_chat_template(messages) == loaded.apply_chat_template(messages)
assert built.special_tokens_map == loaded.special_tokens_map
assert built.model_max_length == loaded.model_max_length and len(built) == len(loaded)
"""


@pytest.mark.parametrize("with_config", [False, True])
def test_a_saved_tokenizer_is_the_same_and_needs_no_torch(tmp_path, with_config):
    changes = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    source, folder = write_llama(tmp_path / "m.gguf", changes), tmp_path / "saved"
    if with_config:  # a model folder: AutoTokenizer looks at the config's model_type, too
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(GGUFCheckpoint(source).config))
    arguments = json.dumps([str(source), str(folder), TEXTS, [{"role": "user", "content": "the 17"}]])
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", RELOAD, arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr


BAD_TOKENIZERS = {
    "unknown pre": ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre 'tekken' is not supported.*smollm"),
    "no pre": ({"tokenizer.ggml.pre": None}, "has no tokenizer.ggml.pre"),
    "unknown model": ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
    "no tokenizer": ({"tokenizer.ggml.tokens": None}, "has no tokenizer.ggml.tokens"),
    "no merges": ({"tokenizer.ggml.merges": None}, "has no tokenizer.ggml.merges"),
    "alien merge": ({"tokenizer.ggml.merges": ["a b"]}, "has 'a b', which does not merge tokens"),
    "merge of one": ({"tokenizer.ggml.merges": ["the"]}, "has 'the', which does not merge tokens"),
    "twice": ({"tokenizer.ggml.tokens": [*BYTE_LEVEL[:-1], "the"]}, "lists 'the' twice"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, f"has 2 values for {len(BYTE_LEVEL)} tokens"),
    "template": ({"tokenizer.chat_template": 7}, "chat_template is '7', which is not of type str"),
    "BOS of none": ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "does not say which"),
    "no scores": ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None}, "has no tokenizer.ggml.scores"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS.keys())
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(tmp_path, changes, message):
    path = write_llama(tmp_path / "m.gguf", changes)
    checkpoint = GGUFCheckpoint(path)
    with pytest.raises(ConfigError, match=message) as caught:
        checkpoint.tokenizer()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
