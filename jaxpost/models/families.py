"""The families: how each one's `config.json` reads, and where each of its tensors goes.

A family is a function from HF's config to a `ModelConfig` (in `family_configs`) and a function from that to rows of
(our path, HF's name, transpose?). The rows are read forwards to load and backwards to export.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpost.errors import ConfigError
from jaxpost.models import family_configs as configs
from jaxpost.models.config import ModelConfig
from jaxpost.models.config_reader import ConfigReader
from jaxpost.models.rows import Part, Row
from jaxpost.options import nearest

LAYER = "model.layers.{}."


class Family(NamedTuple):
    """One architecture.

    Attributes:
        name: how transformers' class names begin.
        read_config: from the fields of config.json to a ModelConfig.
        rows: where the tensors of its blocks are.
        defaults: of fields that config.json may leave out, where they are not those of Llama.
        classifier: transformers' class with a reward head; None if it has none, "" if it is named as usual.
    """

    name: str
    read_config: Callable[[ConfigReader], ModelConfig]
    rows: Callable[[ModelConfig], list[Row]]
    defaults: dict[str, Any]
    classifier: str | None = ""


def linear(path: str, hf_name: str, bias: bool = False) -> list[Row]:
    """Rows of a linear layer."""
    rows = [Row(path + ".kernel", hf_name + ".weight", transpose=True)]
    return [*rows, Row(path + ".bias", hf_name + ".bias")] if bias else rows


def norm_rows(config: ModelConfig) -> list[Row]:
    """Norms of a block; HF calls the one behind attention by the same name as the one before the MLP."""
    names = {
        "pre": {"attention_norm": "input", "mlp_norm": "post_attention"},
        "post": {"post_attention_norm": "post_attention", "post_mlp_norm": "post_feedforward"},
        "both": {
            "attention_norm": "input",
            "post_attention_norm": "post_attention",
            "mlp_norm": "pre_feedforward",
            "post_mlp_norm": "post_feedforward",
        },
    }[config.norms]
    rows = [Row(f"layers.{ours}.scale", f"{LAYER}{theirs}_layernorm.weight") for ours, theirs in names.items()]
    if config.qk_norm != "none":
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            rows.append(Row(f"layers.attention.{ours}.scale", f"{LAYER}self_attn.{theirs}.weight"))
    return rows


def attention_rows(config: ModelConfig) -> list[Row]:
    """Projections, each a tensor of its own."""
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    rows: list[Row] = []
    for ours, theirs in names.items():
        bias = ("out" if ours == "out" else "qkv") in config.biases
        rows += linear(f"layers.attention.{ours}", f"{LAYER}self_attn.{theirs}", bias)
    return rows


def mlp_rows(ours: str, theirs: str, bias: bool = False) -> list[Row]:
    """A gated MLP; also those of experts, all at once."""
    return [row for name in ("gate", "up", "down") for row in linear(ours + name, f"{theirs}{name}_proj", bias)]


def dense_rows(config: ModelConfig) -> list[Row]:
    """Most families."""
    mlp = mlp_rows("layers.mlp.", f"{LAYER}mlp.", "mlp" in config.biases)
    return norm_rows(config) + attention_rows(config) + mlp


def qwen_moe_rows(config: ModelConfig) -> list[Row]:
    """Experts, and the shared one if there is."""
    rows = norm_rows(config) + attention_rows(config) + linear("layers.mlp.router", f"{LAYER}mlp.gate")
    rows += mlp_rows("layers.mlp.experts.", LAYER + "mlp.experts.{}.")
    if config.experts and config.experts.shared_mlp_dim:
        rows += mlp_rows("layers.mlp.shared.", f"{LAYER}mlp.shared_expert.")
        rows += linear("layers.mlp.shared_share", f"{LAYER}mlp.shared_expert_gate")
    return rows


def mixtral_rows(config: ModelConfig) -> list[Row]:
    """Experts under other names."""
    rows = norm_rows(config) + attention_rows(config)
    rows += linear("layers.mlp.router", f"{LAYER}block_sparse_moe.gate")
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        rows += linear(f"layers.mlp.experts.{ours}", LAYER + "block_sparse_moe.experts.{}." + theirs)
    return rows


def phi3_rows(config: ModelConfig) -> list[Row]:
    """Queries, keys and values are one tensor in HF, and so are gate and up."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    fused = [
        ("attention.query", "self_attn.qkv_proj", 0, heads),
        ("attention.key", "self_attn.qkv_proj", heads, heads + kv_heads),
        ("attention.value", "self_attn.qkv_proj", heads + kv_heads, heads + 2 * kv_heads),
        ("mlp.gate", "mlp.gate_up_proj", 0, config.mlp_dim),
        ("mlp.up", "mlp.gate_up_proj", config.mlp_dim, 2 * config.mlp_dim),
    ]
    parts = [
        Row(f"layers.{ours}.kernel", f"{LAYER}{theirs}.weight", transpose=True, part=Part(start, stop))
        for ours, theirs, start, stop in fused
    ]
    out = linear("layers.attention.out", f"{LAYER}self_attn.o_proj")
    return norm_rows(config) + parts + out + linear("layers.mlp.down", f"{LAYER}mlp.down_proj")


LLAMA: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
}
EXPERTS = {"router_aux_loss_coef": 0.001, "norm_topk_prob": False}
QWEN = {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
QWEN2_MOE = {
    **QWEN,
    **EXPERTS,
    "qkv_bias": True,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
QWEN3_MOE = {**QWEN, **EXPERTS, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA3 = {
    **GEMMA,
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}
MISTRAL = {"max_position_embeddings": 131_072, "sliding_window": 4096}
MIXTRAL = {
    **EXPERTS,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
PHI3 = {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
SMOLLM3 = {
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_theta": 2_000_000.0,
    "use_sliding_window": False,
    "no_rope_layer_interval": 4,
}
OLMO3 = {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096}
GRANITE = dict.fromkeys(["attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"], 1.0)

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", configs.read_llama, dense_rows, {}),
    "mistral": Family("Mistral", configs.read_mistral, dense_rows, MISTRAL),
    "mixtral": Family("Mixtral", configs.read_mixtral, mixtral_rows, MIXTRAL),
    "qwen2": Family("Qwen2", configs.read_qwen2, dense_rows, QWEN),
    "qwen2_moe": Family("Qwen2Moe", configs.read_qwen2_moe, qwen_moe_rows, QWEN2_MOE),
    "qwen3": Family("Qwen3", configs.read_qwen3, dense_rows, {**QWEN, "head_dim": 128}),
    "qwen3_moe": Family("Qwen3Moe", configs.read_qwen3_moe, qwen_moe_rows, QWEN3_MOE),
    "gemma": Family("Gemma", configs.read_gemma1, dense_rows, {**GEMMA, "hidden_activation": None}),
    "gemma2": Family(
        "Gemma2",
        configs.read_gemma2,
        dense_rows,
        {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": Family(
        "Gemma3", configs.read_gemma3, dense_rows, GEMMA3, classifier="Gemma3TextForSequenceClassification"
    ),
    "phi3": Family("Phi3", configs.read_phi3, phi3_rows, PHI3),
    "smollm3": Family("SmolLM3", configs.read_smollm3, dense_rows, SMOLLM3),
    "olmo2": Family("Olmo2", configs.read_olmo2, dense_rows, {"rms_norm_eps": 1e-5}),
    "olmo3": Family("Olmo3", configs.read_olmo3, dense_rows, OLMO3),
    "granite": Family("Granite", configs.read_granite, dense_rows, GRANITE, classifier=None),
}


def read_config(config: dict[str, Any], source: str) -> ModelConfig:
    """Read a parsed `config.json`.

    Args:
        config: the JSON object.
        source: what to call it in errors, e.g. its path.

    Raises:
        ConfigError: unknown architecture, missing or malformed field, or a field that nothing here understands.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(
            f"{source}: model_type {kind!r:.80} is not supported{nearest(str(kind), FAMILIES)}; "
            f"known: {', '.join(FAMILIES)}"
        )
    reader = ConfigReader(config, source, {**LLAMA, **FAMILIES[kind].defaults})
    model_config = FAMILIES[kind].read_config(reader)
    reader.close()
    return dataclasses.replace(model_config, hf=dict(config))


def rows_of(config: ModelConfig, head: str = "lm") -> list[Row]:
    """The family's rows for this configuration and head: every parameter exactly once."""
    rows = [Row("embed.embedding", "model.embed_tokens.weight"), Row("norm.scale", "model.norm.weight")]
    if head == "reward":
        rows += linear("head", "score")
    elif not config.tie_embeddings:
        rows += linear("head", "lm_head")
    return rows + FAMILIES[config.hf["model_type"]].rows(config)


def architecture(config: ModelConfig, head: str, source: str = "this model") -> str:
    """transformers' class for this model.

    Raises:
        ConfigError: it has none with a reward head for this family.
    """
    family = FAMILIES[config.hf["model_type"]]
    if head == "lm":
        return f"{family.name}ForCausalLM"
    if family.classifier is None:
        raise ConfigError(f"{source}: transformers has no reward model of the family {config.hf['model_type']}")
    return family.classifier or f"{family.name}ForSequenceClassification"
