"""Tiny configurations of every model family, with odd shapes: the least that each switch of a family can hide behind.

`CONFIGS` maps `<model_type>-<what>` to the fields of a `config.json` in transformers 5's spelling; a family's fields
are its `FAMILIES` entry changed by those of the case. `OLD_SPELLINGS` holds fields as transformers 4 wrote them.
"""

from typing import Any

Fields = dict[str, Any]

# Heads times head_dim is not the width, and neither divides the other; a token id below 3 is never drawn.
BASE: Fields = {
    "vocab_size": 301,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EPSILON: Fields = {"rms_norm_eps": 3e-3}  # large enough that another one shows in the logits
ODD_HEADS: Fields = {"head_dim": 10}
BIASES: Fields = {"attention_bias": True, "mlp_bias": True}
TIED: Fields = {"tie_word_embeddings": True}
UNTIED: Fields = {"tie_word_embeddings": False}
PATTERN = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]

EXPERTS: Fields = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 22}
GRANITE: Fields = {
    "embedding_multiplier": 3.5,
    "attention_multiplier": 0.21,
    "residual_multiplier": 0.37,
    "logits_scaling": 1.9,
}
VISION: Fields = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def rotary(rope_type: str, **fields: Any) -> Fields:
    """Settings of one type; with this base a few pairs turn fast, a few slowly, and a few in between."""
    return {"rope_parameters": {"rope_theta": 50.0, "rope_type": rope_type, **fields}}


def longrope_factors(pairs: int) -> Fields:
    """A factor of its own for each pair of dimensions, in short texts and in long ones."""
    return {
        "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [1.5 + 1.3 * pair for pair in range(pairs)],
    }


LLAMA3: Fields = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE: Fields = {"rope_type": "longrope", "original_max_position_embeddings": 16}
YARN: Fields = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 32}
TWO_BASES: Fields = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0},
    }
}
GEMMA3: Fields = {
    **ODD_HEADS,
    "num_hidden_layers": 4,
    "layer_types": PATTERN,
    "sliding_window": 5,
    "query_pre_attn_scalar": 13,
}
# What a family is unless a case says otherwise.
FAMILIES: dict[str, Fields] = {
    "llama": {},
    "mistral": {**ODD_HEADS, "sliding_window": 7},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 34, "num_hidden_layers": 2},
    "qwen3": ODD_HEADS,
    "qwen3_moe": {**ODD_HEADS, **EXPERTS, "num_hidden_layers": 2},
    "gemma": ODD_HEADS,
    "gemma2": {**ODD_HEADS, "num_hidden_layers": 4, "sliding_window": 5, "query_pre_attn_scalar": 17},
    "gemma3_text": GEMMA3,
    "gemma3": {},
    "phi3": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "sliding_window": None},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4, "layer_types": PATTERN, "sliding_window": 6},
    "granite": GRANITE,
}
CASES: dict[str, dict[str, Fields]] = {
    "llama": {
        "tied": TIED,
        "biases": {**ODD_HEADS, **BIASES},
        "odd_shapes": {"hidden_size": 42, "head_dim": 6, "num_key_value_heads": 3},
        "multi_query": {"num_key_value_heads": 1, "hidden_act": "gelu", **rotary("default", rope_theta=500000.0)},
        "linear": {**TIED, **rotary("linear", factor=2.5)},
        "dynamic": {"max_position_embeddings": 16, **ODD_HEADS, **rotary("dynamic", factor=3.0)},
        "llama3": {**ODD_HEADS, **rotary(**LLAMA3)},
        "yarn": {"head_dim": 16, **rotary(**YARN, attention_factor=0.8, beta_fast=2.0, beta_slow=0.25)},
        "longrope": {**ODD_HEADS, **rotary(**LONGROPE, **longrope_factors(5), factor=6.0)},
    },
    "mistral": {
        "window": {},
        "full": {"sliding_window": None, **TIED},
        "multi_query": {"num_key_value_heads": 1, "head_dim": None, "sliding_window": 4, **rotary("linear", factor=2)},
    },
    "mixtral": {
        "untied": {},
        "tied": {**TIED, **ODD_HEADS, "num_experts_per_tok": 3},
        "window": {"sliding_window": 6, "num_experts_per_tok": 4, "num_key_value_heads": 3},
    },
    "qwen2": {
        "tied": TIED,
        "window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        "yarn": {"num_key_value_heads": 1, **rotary(**YARN)},
    },
    "qwen2_moe": {
        "plain": {"norm_topk_prob": False},
        "normalized": {**TIED, "norm_topk_prob": True, "num_experts_per_tok": 3},
        "window": {"qkv_bias": False, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    },
    "qwen3": {
        "tied": {**TIED, "attention_bias": True},
        "window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        "yarn": {"head_dim": 16, **rotary(**YARN, mscale=1.3, mscale_all_dim=0.6, truncate=False)},
    },
    "qwen3_moe": {
        "plain": {"norm_topk_prob": False},
        "normalized": {**TIED, "norm_topk_prob": True, "num_experts_per_tok": 3, "attention_bias": True},
        "window": {"norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 6, "num_experts_per_tok": 1},
    },
    "gemma": {
        "tied": TIED,
        "untied": {**UNTIED, "num_key_value_heads": 1},
        "biases": {**TIED, "attention_bias": True},
    },
    "gemma2": {
        "caps": {**TIED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
        "no_caps": {
            **UNTIED,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_activation": "gelu",
        },
        "pattern": {**TIED, "attention_bias": True, "layer_types": PATTERN, "attn_logit_softcapping": 1.0},
    },
    "gemma3_text": {
        "two_bases": {**TIED, **TWO_BASES},
        "untied": {**UNTIED, "num_key_value_heads": 1, "final_logit_softcapping": 1.5},
        "biases": {**TIED, "attention_bias": True, "query_pre_attn_scalar": 10},
    },
    "gemma3": {
        "two_bases": {**TIED, "text_config": {**TIED, **TWO_BASES}},
        "untied": {**UNTIED, "text_config": {**TIED, "num_key_value_heads": 1}},  # what stands outside counts
        "biases": {**TIED, "text_config": {**TIED, "attention_bias": True, "sliding_window": 7}},
    },
    "phi3": {
        "window": {"sliding_window": 7},
        "tied": {**TIED, "num_key_value_heads": 5},
        "partial": rotary("default", partial_rotary_factor=0.75),
        "longrope": {"original_max_position_embeddings": 16, **rotary(**LONGROPE, **longrope_factors(4))},
        "longrope_partial": {
            **TIED,
            "original_max_position_embeddings": 16,
            **rotary(**LONGROPE, **longrope_factors(3), partial_rotary_factor=0.75, factor=3.0),
        },
    },
    "smollm3": {
        "tied": TIED,
        "window": {**UNTIED, "use_sliding_window": True, "sliding_window": 6},
        "biases": {**TIED, **BIASES, "no_rope_layers": [0, 1, 1, 1], **rotary(**YARN, beta_fast=2)},
    },
    "olmo2": {
        "untied": {},
        "tied": {**TIED, "num_key_value_heads": 6},
        "biases": {"attention_bias": True, "num_key_value_heads": 1, **rotary("linear", factor=3.0)},
    },
    "olmo3": {
        "two_bases": TWO_BASES,
        "tied": {**TIED, "num_key_value_heads": 6, "sliding_window": 3},
        "biases": {"attention_bias": True, "rope_parameters": {"full_attention": {**YARN, "rope_theta": 50.0}}},
    },
    "granite": {
        "untied": {},
        "tied": {**TIED, "num_key_value_heads": 1, "residual_multiplier": 1.0},
        "biases": {**BIASES, "embedding_multiplier": 0.6, "logits_scaling": 0.25, **rotary(**LLAMA3)},
    },
}


def _fields(kind: str, case: Fields) -> Fields:
    if kind != "gemma3":
        return {"model_type": kind, **BASE, **EPSILON, **FAMILIES[kind], **case}
    text = {"model_type": "gemma3_text", **BASE, **EPSILON, **GEMMA3, **case["text_config"]}
    return {"model_type": kind, **case, "text_config": text, "vision_config": VISION, "mm_tokens_per_image": 4}


CONFIGS = {f"{kind}-{what}": _fields(kind, case) for kind, cases in CASES.items() for what, case in cases.items()}

# As transformers 4 wrote them, and as released models have them: moved, renamed, null, or left to the defaults.
OLD_CASES: dict[str, Fields] = {
    "llama-linear": {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama-llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "mistral-default_window": {"rope_theta": 1000000.0},
    "mistral-null_window": {"rope_theta": 1000000.0, "sliding_window": None},
    "mixtral-theta": {"rope_theta": 100000.0, "num_local_experts": 5, "num_experts_per_tok": 2},
    "mixtral-default_theta": {"num_local_experts": 5, "sliding_window": None},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen2-no_window": {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 1},
    "qwen2_moe-window": {**EXPERTS, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3-yarn": {**ODD_HEADS, "rope_theta": 1000000.0, "rope_scaling": YARN},
    "qwen3_moe-names": {**ODD_HEADS, **EXPERTS, "rope_theta": 1000000.0, "rope_scaling": None},
    "gemma-activation": {"hidden_act": "gelu", "hidden_activation": None},
    "gemma2-names": {**ODD_HEADS, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    "gemma3_text-pattern": {
        **ODD_HEADS,
        "cache_implementation": "hybrid",
        "sliding_window_pattern": 2,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3-longrope": {
        **FAMILIES["phi3"],
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", **longrope_factors(4)},
        "rope_theta": 250000.0,
    },
    "phi3-partial": {**FAMILIES["phi3"], "partial_rotary_factor": 0.75, "rope_theta": 250000.0},
    "olmo3-yarn": {"rope_theta": 500000.0, "rope_scaling": YARN, "sliding_window": 6, "num_hidden_layers": 5},
    "smollm3-interval": {"rope_theta": 5000000.0, "no_rope_layer_interval": 2, "max_window_layers": 28},
}
# What transformers assumes where only the shapes are given; seven layers show every pattern of layers.
SHAPES = {name: size for name, size in BASE.items() if "token" not in name and name != "max_position_embeddings"}
DEFAULTS = {f"{kind}-defaults": {**SHAPES, "num_hidden_layers": 7} for kind in FAMILIES if kind != "gemma3"}
OLD_SPELLINGS = {
    name: {"model_type": name.split("-")[0], **case}
    for name, case in {**{name: {**BASE, **case} for name, case in OLD_CASES.items()}, **DEFAULTS}.items()
}
# As in Gemma 3's release, which leaves most of the text model to the defaults.
OLD_SPELLINGS["gemma3_text-released"] = {
    "model_type": "gemma3_text",
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 7,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 5,
}
