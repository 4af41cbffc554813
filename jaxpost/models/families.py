"""One entry a family: how its `config.json` reads, and where each of its tensors goes.

A family is a function from HF's config to a `ModelConfig` and a function from that to rows of (our path, HF's name,
transpose?). The rows are read forwards to load and backwards to export.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpost.errors import ConfigError
from jaxpost.models.config import ModelConfig, Rotary
from jaxpost.models.layers import ACTIVATIONS
from jaxpost.options import nearest


class Row(NamedTuple):
    """One tensor: our path, HF's name (`{}` stands for the layer), and whether HF stores it transposed."""

    path: str
    hf_name: str
    transpose: bool = False


class Family(NamedTuple):
    """How one architecture reads and what its tensors are called."""

    architecture: str
    read_config: Callable[["ConfigReader"], ModelConfig]
    rows: Callable[[ModelConfig], list[Row]]


# Fields that say nothing about the mathematics of a decoder's forward pass in training or greedy decoding.
IRRELEVANT = frozenset(
    [
        *("_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "bos_token_id"),
        *("dtype", "eos_token_id", "id2label", "initializer_range", "is_llama_config", "label2id", "model_type"),
        *("name_or_path", "num_labels", "output_attentions", "output_hidden_states", "pad_token_id"),
        *("pretraining_tp", "return_dict", "rope_interleaved", "torch_dtype", "transformers.js_config"),
        *("transformers_version", "unsloth_fixed", "unsloth_version", "use_cache"),
    ]
)


class ConfigReader:
    """Takes fields out of a `config.json` and knows what was left unread."""

    def __init__(self, config: dict[str, Any], source: str):
        self.fields = {name: value for name, value in config.items() if value is not None}
        self.source = source
        self.taken: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """The field's value; without a default the field must be there.

        Raises:
            ConfigError: the field is missing, or of another type than the default.
        """
        self.taken.add(name)
        if name not in self.fields and default is None:
            raise ConfigError(f"{self.source}: config.json lacks {name!r}")
        value = self.fields.get(name, default)
        if default is not None and not isinstance(value, (int, float) if isinstance(default, float) else type(default)):
            raise ConfigError(f"{self.source}: config.json has {name} = {value!r}, expected {type(default).__name__}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.source}: config.json has {name} = {value!r}, expected a positive whole number")
        return value

    def close(self) -> None:
        """Refuse a field that nothing read: it may change the mathematics."""
        unread = sorted(set(self.fields) - self.taken - IRRELEVANT)
        if unread:
            raise ConfigError(
                f"{self.source}: config.json has {', '.join(f'{name} = {self.fields[name]!r}' for name in unread)}, "
                "which jaxpost does not know for this family; remove it if it does not change the model"
            )


def _llama_config(reader: ConfigReader) -> ModelConfig:
    heads, dim = reader.size("num_attention_heads"), reader.size("hidden_size")
    kv_heads = reader.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"{reader.source}: {heads} attention heads cannot share {kv_heads} key-value heads")
    head_dim = reader.size("head_dim", max(1, dim // heads))
    if head_dim % 2:
        raise ConfigError(f"{reader.source}: head_dim {head_dim} is odd; rotary embedding needs pairs")
    activation = reader.take("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"{reader.source}: hidden_act {activation!r} is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    return ModelConfig(
        vocab_size=reader.size("vocab_size"),
        num_layers=reader.size("num_hidden_layers"),
        embed_dim=dim,
        mlp_dim=reader.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=reader.size("max_position_embeddings", 2048),
        norm_eps=float(reader.take("rms_norm_eps", 1e-6)),
        activation=activation,
        rotary=_rotary(reader),
        tie_embeddings=reader.take("tie_word_embeddings", False),
        attention_bias=reader.take("attention_bias", False),
        mlp_bias=reader.take("mlp_bias", False),
    )


def _rotary(reader: ConfigReader) -> Rotary:
    """Rotary settings from `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
    scaling = {**reader.take("rope_scaling", {}), **reader.take("rope_parameters", {})}
    inner = ConfigReader(scaling, f"{reader.source}: rope_parameters")
    kind = inner.take("rope_type", scaling.get("type", "default"))
    inner.take("type", kind)
    theta = float(inner.take("rope_theta", float(reader.take("rope_theta", 10_000.0))))
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(f"{reader.source}: rotary type {kind!r} is not supported; known: default, linear, llama3")
    rotary = Rotary(theta=theta)
    if kind == "linear":
        rotary = Rotary(theta=theta, kind=kind, factor=float(inner.take("factor")))
    if kind == "llama3":
        rotary = Rotary(
            theta=theta,
            kind=kind,
            factor=float(inner.take("factor")),
            low_freq_factor=float(inner.take("low_freq_factor")),
            high_freq_factor=float(inner.take("high_freq_factor")),
            original_max_positions=inner.size("original_max_position_embeddings"),
        )
    inner.close()
    return rotary


def _linear(path: str, hf_name: str, bias: bool) -> list[Row]:
    rows = [Row(f"{path}.kernel", f"{hf_name}.weight", transpose=True)]
    return [*rows, Row(f"{path}.bias", f"{hf_name}.bias")] if bias else rows


def _llama_rows(config: ModelConfig) -> list[Row]:
    rows = [Row("embed.embedding", "model.embed_tokens.weight"), Row("norm.scale", "model.norm.weight")]
    if not config.tie_embeddings:
        rows.append(Row("head.kernel", "lm_head.weight", transpose=True))
    ours, theirs = "layers.", "model.layers.{}."
    for name, hf_name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj")):
        rows += _linear(f"{ours}attention.{name}", f"{theirs}self_attn.{hf_name}", config.attention_bias)
    for name in ("gate", "up", "down"):
        rows += _linear(f"{ours}mlp.{name}", f"{theirs}mlp.{name}_proj", config.mlp_bias)
    rows.append(Row(f"{ours}attention_norm.scale", f"{theirs}input_layernorm.weight"))
    rows.append(Row(f"{ours}mlp_norm.scale", f"{theirs}post_attention_layernorm.weight"))
    return rows


FAMILIES: dict[str, Family] = {"llama": Family("LlamaForCausalLM", _llama_config, _llama_rows)}


def read_config(config: dict[str, Any], source: str) -> ModelConfig:
    """Read a parsed `config.json`.

    Args:
        config: the JSON object.
        source: what to call it in errors, e.g. its path.

    Raises:
        ConfigError: unknown architecture, missing or malformed field, or a field that nothing here understands.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(
            f"{source}: model_type {kind!r} is not supported{nearest(str(kind), FAMILIES)}; "
            f"known: {', '.join(FAMILIES)}"
        )
    reader = ConfigReader(config, source)
    model_config = FAMILIES[kind].read_config(reader)
    reader.close()
    return dataclasses.replace(model_config, hf=dict(config))


def rows_of(config: ModelConfig) -> list[Row]:
    """The family's rows for this configuration: every parameter exactly once."""
    return FAMILIES[config.hf["model_type"]].rows(config)
