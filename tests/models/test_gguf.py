"""GGUF files as checkpoints: names, layout and config of each architecture, and what is refused."""

import numpy as np
import pytest

from jaxpost import from_pretrained
from jaxpost.errors import ConfigError
from jaxpost.models.gguf import GGUFCheckpoint
from jaxpost.models.gguf_architectures import ARCHITECTURES
from jaxpost.models.gguf_file import Metadata
from tests.models.gguf_files import BYTE_LEVEL, SIZES, Q, gemma_keys, gguf, hf_tensors, llama3_factors, write_model

LLAMA = SIZES["llama"]
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
GEMMA_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
SILU = {"hidden_act": "silu", "vocab_size": len(BYTE_LEVEL)}
GEMMA_SIZE = len(gemma_keys()["tokenizer.ggml.tokens"])
GELU = {"hidden_activation": "gelu_pytorch_tanh", "vocab_size": GEMMA_SIZE, "attention_bias": False}
# What each architecture's config.json holds beside the sizes that all have.
CONFIGS = {
    "llama": {"model_type": "llama", "rope_theta": 50000.0, "attention_bias": False, "mlp_bias": False, **SILU, **IDS},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1000000.0, **SILU, **IDS},
    "qwen3": {"model_type": "qwen3", "rope_theta": 5000000.0, "attention_bias": False, **SILU, **IDS},
    "gemma": {
        "model_type": "gemma",
        "rope_theta": 10000.0,
        "hidden_act": "gelu_pytorch_tanh",
        "vocab_size": GEMMA_SIZE,
        "attention_bias": False,
        **GEMMA_IDS,
    },
    "gemma2": {
        "model_type": "gemma2",
        "rope_theta": 10000.0,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
        "attn_logit_softcapping": 45.0,
        "final_logit_softcapping": 25.0,
        "query_pre_attn_scalar": 32,
        **GELU,
        **GEMMA_IDS,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        "sliding_window": 6,
        "query_pre_attn_scalar": 32,
        **GELU,
        **GEMMA_IDS,
    },
}
KINDS = [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1]


@pytest.mark.parametrize(
    ("arch", "kind"),
    [*(("llama", kind) for kind in KINDS), *((arch, Q.Q8_0) for arch in ARCHITECTURES if arch != "llama")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_tensors_come_back_in_hf_layout(tmp_path, arch, kind):
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", arch=arch, kind=kind))
    tensors = hf_tensors(checkpoint.config["vocab_size"], arch=arch)
    assert checkpoint.names() == tensors.keys()
    for name, weights in tensors.items():
        stored = kind if weights.ndim > 1 else Q.F32
        # Quantisation works on rows, so reordering rows commutes with it: the result is exact.
        expected = gguf.quants.dequantize(gguf.quants.quantize(weights, stored), stored)
        if arch.startswith("gemma") and weights.ndim == 1:
            expected = (weights + 1) - 1  # in float32, as the file holds it
        read = checkpoint.read(name)
        assert read.dtype == np.float32 and type(read) is np.ndarray and read.flags.writeable
        assert checkpoint.shape(name) == read.shape == weights.shape
        np.testing.assert_array_equal(read, expected, err_msg=name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_config_is_the_hf_config(tmp_path, arch):
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", arch=arch))
    sizes = SIZES[arch]
    assert checkpoint.config == CONFIGS[arch] | {
        "architectures": [ARCHITECTURES[arch].hf_class],
        "hidden_size": sizes.embed,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_file_loads_as_a_model_of_its_family(tmp_path, arch):
    path = write_model(tmp_path / "m.gguf", arch=arch)
    model = from_pretrained(path)
    assert model.config.hf == GGUFCheckpoint(path).config
    embedding = hf_tensors(model.config.vocab_size, arch=arch)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(model.embed.embedding[...], embedding)


@pytest.mark.parametrize(("eos", "turn", "ends"), [(1, 5, [1, 5]), (1, 1, 1), (1, None, 1), (None, 5, 5)])
def test_generation_ends_with_the_text_or_with_the_turn(tmp_path, eos, turn, ends):
    changes = {"tokenizer.ggml.eos_token_id": eos, "tokenizer.ggml.eot_token_id": turn}
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", changes, arch="gemma"))
    assert checkpoint.generation_config == {"bos_token_id": 2, "eos_token_id": ends, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("arch", "layers", "heads", "head_dim", "hidden", "scalar"),
    [
        ("gemma2", 26, 8, 256, 2304, 256),  # the published models: 2B, 9B, 27B
        ("gemma2", 42, 16, 256, 3584, 256),
        ("gemma2", 46, 32, 128, 4608, 144),
        ("gemma3", 26, 4, 256, 1152, 256),  # 1B, 12B, 27B
        ("gemma3", 48, 16, 256, 3840, 256),
        ("gemma3", 62, 32, 128, 5376, 168),
    ],
)
def test_the_scale_of_the_scores_is_the_published_models(arch, layers, heads, head_dim, hidden, scalar):
    config = {"num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim, "hidden_size": hidden}
    assert ARCHITECTURES[arch].read(Metadata("m.gguf", {}), config)["query_pre_attn_scalar"] == scalar


def test_what_a_gemma_file_leaves_out_has_llama_cpps_meaning(tmp_path):
    absent = ["attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"]
    changes = {f"gemma2.{key}": None for key in absent}
    config = GGUFCheckpoint(write_model(tmp_path / "2.gguf", changes, arch="gemma2")).config
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50.0, 30.0)
    assert config["sliding_window"] == 4096
    changes = {"gemma3.attention.sliding_window": None, "gemma3.final_logit_softcapping": 20.0}
    config = GGUFCheckpoint(write_model(tmp_path / "3.gguf", changes, arch="gemma3")).config
    assert "sliding_window" not in config and set(config["layer_types"]) == {"full_attention"}
    assert config["final_logit_softcapping"] == 20.0


def test_a_gemma_file_may_state_its_pattern_and_its_local_base(tmp_path):
    changes = {"gemma3.attention.sliding_window_pattern": 3, "gemma3.rope.freq_base_swa": 5000.0}
    config = GGUFCheckpoint(write_model(tmp_path / "m.gguf", changes, arch="gemma3")).config
    assert [index for index, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == [2, 5]
    assert config["rope_local_base_freq"] == 5000.0


def test_what_the_file_leaves_out_has_llama_cpps_meaning(tmp_path):
    absent = ["llama.attention.head_count_kv", "llama.rope.freq_base", "llama.rope.dimension_count"]
    absent += [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "padding")]
    wide = {
        f"blk.{layer}.attn_{name}.weight": np.zeros((LLAMA.heads * LLAMA.head_dim, LLAMA.embed), np.float32)
        for layer in range(LLAMA.layers)
        for name in "kv"
    }
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", dict.fromkeys(absent), wide))
    assert checkpoint.config["num_key_value_heads"] == LLAMA.heads
    assert checkpoint.config["rope_theta"] == 10000.0 and checkpoint.config["head_dim"] == LLAMA.head_dim
    assert checkpoint.config["bos_token_id"] is None and checkpoint.config["pad_token_id"] is None
    assert checkpoint.generation_config == {"eos_token_id": 2}


def test_an_output_matrix_means_untied_embeddings(tmp_path):
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", tied=False))
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
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", changes, {"rope_freqs.weight": factors}))
    assert checkpoint.config.get("rope_scaling") == expected
    assert checkpoint.names() == hf_tensors(1).keys()


REFUSED = {
    "architecture": (
        dict(changes={"general.architecture": "mamba"}),
        r"architecture 'mamba' is not supported \(supported: llama, qwen2, qwen3, gemma",
    ),
    "missing key": (dict(changes={"llama.block_count": None}), "has no llama.block_count"),
    "wrong type": (dict(changes={"llama.block_count": "two"}), "llama.block_count is 'two'.*not of type int"),
    "per-layer heads": (dict(changes={"llama.attention.head_count": [4, 4]}), "head_count is .*not of type int"),
    "zero": (dict(changes={"llama.embedding_length": 0}), "llama.embedding_length is 0"),
    "too many layers": (dict(changes={"llama.block_count": 2**31 - 1}), "2147483647 layers are announced"),
    "heads": (dict(changes={"llama.attention.head_count_kv": 3}), "4 heads cannot share 3"),
    "partial rotary": (dict(changes={"llama.attention.key_length": 32}), "keys 32, values 16, rotary 16"),
    "experts": (dict(changes={"llama.expert_count": 8}), "llama.expert_count may change"),
    "longrope": (dict(changes={"llama.rope.scaling.type": "longrope"}), "'longrope' is not supported"),
    "yarn of two bases": (
        dict(
            arch="gemma3",
            changes={"gemma3.rope.scaling.type": "yarn", "gemma3.rope.scaling.original_context_length": 32},
        ),
        "gemma3.rope.scaling.type 'yarn' is not supported",
    ),
    "factors of another architecture": (
        dict(arch="qwen2", tensor_changes={"rope_freqs.weight": llama3_factors(10000.0, 8.0)}),
        "rope_freqs.weight has no place in a qwen2 model",
    ),
    "untied gemma": (
        dict(arch="gemma", tensor_changes={"output.weight": np.zeros((GEMMA_SIZE, 64), np.float32)}),
        "output.weight has no place in a gemma model",
    ),
    "missing bias": (
        dict(arch="qwen2", tensor_changes={"blk.0.attn_k.bias": None}),
        "blk.0.attn_k.bias is missing",
    ),
    "pattern by layer": (
        dict(arch="gemma2", changes={"gemma2.attention.sliding_window_pattern": [1, 0]}),
        "sliding_window_pattern is .*not of type int",
    ),
    "other factors": (
        dict(tensor_changes={"rope_freqs.weight": llama3_factors(10000.0, 8.0)[::-1].copy()}),
        "rope_freqs.weight holds other factors",
    ),
    "part": (dict(changes={"split.count": 3}), "one part of several.*llama-gguf-split"),
    "missing tensor": (dict(tensor_changes={"blk.1.ffn_up.weight": None}), "blk.1.ffn_up.weight is missing"),
    "no embedding": (dict(tensor_changes={"token_embd.weight": None}), "token_embd.weight is missing"),
    "extra tensor": (
        dict(tensor_changes={"blk.0.attn_q.bias": np.zeros(64, np.float32)}),
        "blk.0.attn_q.bias has no place in a llama model",
    ),
    "shape": (
        dict(tensor_changes={"blk.0.ffn_up.weight": np.zeros((96, 128), np.float32)}),
        r"blk.0.ffn_up.weight has shape \(96, 128\), its metadata says \(96, 64\)",
    ),
    "vocabulary": (
        dict(changes={"tokenizer.ggml.tokens": BYTE_LEVEL[:-1]}),
        f"different sizes: {len(BYTE_LEVEL)} rows.* {len(BYTE_LEVEL) - 1} in tokenizer.ggml.tokens",
    ),
    "stated vocabulary": (dict(changes={"llama.vocab_size": 7}), "different sizes.* 7 in llama.vocab_size"),
    "token id": (
        dict(changes={"tokenizer.ggml.eos_token_id": len(BYTE_LEVEL)}),
        f"eos_token_id is {len(BYTE_LEVEL)}, outside of the vocabulary",
    ),
    "quantisation": (
        dict(tensor_changes={"output_norm.weight": np.zeros(64, np.float64)}),
        "output_norm.weight has quantisation type F64, which the gguf package cannot dequantise",
    ),
}


@pytest.mark.parametrize(("kwargs", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_faithfully_is_refused(tmp_path, kwargs, message):
    path = write_model(tmp_path / "m.gguf", **kwargs)
    with pytest.raises(ConfigError, match=message) as caught:
        GGUFCheckpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
