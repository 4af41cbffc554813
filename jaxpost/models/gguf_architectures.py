"""What each `general.architecture` of a GGUF file means: its HF model, its tensors, and the config it leaves unsaid.

Source: llama.cpp. Its converter (conversion/*.py) tells what was renamed, reordered and shifted, its loader
(src/models/*.cpp) what a file means that leaves a key out.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxpost.models.gguf_file import HF_FOLDER, Metadata

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor: its GGUF name, its HF name (`{}` is the layer) and its HF shape in the letters of `sizes`."""

    gguf: str
    hf: str
    shape: str
    heads: str = ""  # config key of the number of heads, where llama.cpp interleaved each head's rotary halves
    offset: float = 0.0  # added by llama.cpp, where HF scales by 1 + weight and its graph by the weight alone
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        hf_class: transformers' class.
        config: what is the same in every file.
        rows: its tensors.
        read: the fields of its own, from the metadata and the fields that all architectures share.
        rope_factors: a tensor of the file may stand for Llama 3's rotary scaling.
    """

    hf_class: str
    config: Config
    rows: tuple[Row, ...]
    read: Callable[[Metadata, Config], dict[str, Any]] = lambda metadata, config: {}
    rope_factors: bool = False


def sizes(config: Config) -> dict[str, int]:
    """Return the dimension that each letter of `Row.shape` stands for."""
    head_dim = config["head_dim"]
    return {
        "V": config["vocab_size"],
        "D": config["hidden_size"],
        "F": config["intermediate_size"],
        "H": head_dim,
        "Q": config["num_attention_heads"] * head_dim,
        "K": config["num_key_value_heads"] * head_dim,
    }


def _layer(gguf: str, hf: str, shape: str) -> Row:
    return Row(f"blk.{{}}.{gguf}", f"model.layers.{{}}.{hf}", shape)


def _interleaved(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return the rows for an architecture whose rotary embedding turns neighbours instead of halves."""
    heads = {"blk.{}.attn_q.weight": "num_attention_heads", "blk.{}.attn_k.weight": "num_key_value_heads"}
    return tuple(dataclasses.replace(row, heads=heads.get(row.gguf, "")) for row in rows)


def _centred(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return the rows for norms that HF keeps around zero."""
    return tuple(dataclasses.replace(row, offset=1.0) for row in rows)


_DENSE = (
    Row("token_embd.weight", "model.embed_tokens.weight", "VD"),
    _layer("attn_q.weight", "self_attn.q_proj.weight", "QD"),
    _layer("attn_k.weight", "self_attn.k_proj.weight", "KD"),
    _layer("attn_v.weight", "self_attn.v_proj.weight", "KD"),
    _layer("attn_output.weight", "self_attn.o_proj.weight", "DQ"),
    _layer("ffn_gate.weight", "mlp.gate_proj.weight", "FD"),
    _layer("ffn_up.weight", "mlp.up_proj.weight", "FD"),
    _layer("ffn_down.weight", "mlp.down_proj.weight", "DF"),
)
_HEAD = (Row("output.weight", "lm_head.weight", "VD", optional=True),)
_BIASES = (
    _layer("attn_q.bias", "self_attn.q_proj.bias", "Q"),
    _layer("attn_k.bias", "self_attn.k_proj.bias", "K"),
    _layer("attn_v.bias", "self_attn.v_proj.bias", "K"),
)
_FINAL_NORM = Row("output_norm.weight", "model.norm.weight", "D")
_PRE_NORMS = (
    _FINAL_NORM,
    _layer("attn_norm.weight", "input_layernorm.weight", "D"),
    _layer("ffn_norm.weight", "post_attention_layernorm.weight", "D"),
)
_PRE_AND_POST_NORMS = (
    _FINAL_NORM,
    _layer("attn_norm.weight", "input_layernorm.weight", "D"),
    _layer("post_attention_norm.weight", "post_attention_layernorm.weight", "D"),
    _layer("ffn_norm.weight", "pre_feedforward_layernorm.weight", "D"),
    _layer("post_ffw_norm.weight", "post_feedforward_layernorm.weight", "D"),
)
_HEAD_NORMS = (
    _layer("attn_q_norm.weight", "self_attn.q_norm.weight", "H"),
    _layer("attn_k_norm.weight", "self_attn.k_norm.weight", "H"),
)


def _gemma2(metadata: Metadata, config: Config) -> dict[str, Any]:
    """Return Gemma 2's windows, soft caps and scale of the scores; the defaults are llama.cpp's."""
    return {
        "sliding_window": metadata.positive("gemma2.attention.sliding_window", int, 4096),
        "layer_types": _layer_types(config, metadata.positive("gemma2.attention.sliding_window_pattern", int, 2)),
        "attn_logit_softcapping": metadata.positive("gemma2.attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": metadata.positive("gemma2.final_logit_softcapping", float, 30.0),
        "query_pre_attn_scalar": _query_scalar(config, largest=46),
    }


def _gemma3(metadata: Metadata, config: Config) -> dict[str, Any]:
    """Return Gemma 3's windows, whose layers have a rotary base of their own and no scaling, and its other fields.

    A file without a window has full attention in every layer.
    """
    window = metadata.positive("gemma3.attention.sliding_window", int, None)
    period = metadata.positive("gemma3.attention.sliding_window_pattern", int, 6)
    fields = {
        "layer_types": _layer_types(config, period if window else 1),
        "rope_local_base_freq": metadata.positive("gemma3.rope.freq_base_swa", float, 10000.0),
        "query_pre_attn_scalar": _query_scalar(config, largest=62),
    }
    cap = metadata.positive("gemma3.final_logit_softcapping", float, None)
    kind = config.get("rope_scaling", {}).get("rope_type", "linear")
    if kind != "linear":  # llama.cpp would stretch the sliding layers, too, and transformers not
        raise metadata.error(f"gemma3.rope.scaling.type {kind!r} is not supported; {HF_FOLDER}")
    optional = {"sliding_window": window, "final_logit_softcapping": cap}
    return fields | {key: value for key, value in optional.items() if value is not None}


def _layer_types(config: Config, period: int) -> list[str]:
    """Return each layer's kind of attention: the last of every `period` layers sees everything."""
    layers = range(1, config["num_hidden_layers"] + 1)
    return ["sliding_attention" if layer % period else "full_attention" for layer in layers]


def _query_scalar(config: Config, largest: int) -> int:
    """Return the inverse square of the scores' scale, which GGUF files leave out.

    llama.cpp knows the largest model of a generation by its number of layers; only that one divides by the width of
    a head's share of the embedding, all others by the head's own dimension.
    """
    if config["num_hidden_layers"] == largest:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


_GELU = "gelu_pytorch_tanh"  # what llama.cpp computes for Gemma
ARCHITECTURES = {
    "llama": Architecture(
        hf_class="LlamaForCausalLM",
        config={"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        rows=(*_interleaved(_DENSE), *_HEAD, *_PRE_NORMS),
        rope_factors=True,
    ),
    "qwen2": Architecture(
        hf_class="Qwen2ForCausalLM",
        config={"model_type": "qwen2", "hidden_act": "silu"},
        rows=(*_DENSE, *_HEAD, *_PRE_NORMS, *_BIASES),
    ),
    "qwen3": Architecture(
        hf_class="Qwen3ForCausalLM",
        config={"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False},
        rows=(*_DENSE, *_HEAD, *_PRE_NORMS, *_HEAD_NORMS),
    ),
    "gemma": Architecture(
        hf_class="GemmaForCausalLM",
        config={"model_type": "gemma", "hidden_act": _GELU, "attention_bias": False},
        rows=(*_DENSE, *_centred(_PRE_NORMS)),
    ),
    "gemma2": Architecture(
        hf_class="Gemma2ForCausalLM",
        config={"model_type": "gemma2", "hidden_activation": _GELU, "attention_bias": False},
        rows=(*_DENSE, *_centred(_PRE_AND_POST_NORMS)),
        read=_gemma2,
    ),
    "gemma3": Architecture(
        hf_class="Gemma3ForCausalLM",
        config={"model_type": "gemma3_text", "hidden_activation": _GELU, "attention_bias": False},
        rows=(*_DENSE, *_HEAD, *_centred((*_PRE_AND_POST_NORMS, *_HEAD_NORMS))),
        read=_gemma3,
    ),
}
