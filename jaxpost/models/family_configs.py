"""How each family's `config.json` reads: one function from its fields to a `ModelConfig`."""

import dataclasses
from typing import Any

from jaxpost.models.config import Experts, ModelConfig, Rotary
from jaxpost.models.config_reader import FULL, MAX_LAYERS, SLIDING, ConfigReader, read_rotary, read_windows
from jaxpost.models.layers import ACTIVATIONS


def _decoder(
    reader: ConfigReader, *, activation: str = "hidden_act", rotaries: tuple[Rotary, ...] = (), **switches: Any
) -> ModelConfig:
    """What all families share: sizes, one rotary embedding in every layer, full attention."""
    heads, dim = reader.size("num_attention_heads"), reader.size("hidden_size")
    kv_heads = reader.optional_size("num_key_value_heads") or heads
    layers = reader.size("num_hidden_layers", MAX_LAYERS)
    if heads % kv_heads:
        raise reader.error(f"{heads} attention heads cannot share {kv_heads} key-value heads")
    head_dim = _head_dim(reader)
    act = reader.take(activation, str)
    if act not in ACTIVATIONS:
        raise reader.error(f"{activation} {act!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    shared: dict[str, Any] = {
        "attention_scale": head_dim**-0.5,
        "rotaries": rotaries or (read_rotary(reader, head_dim),),
        "layer_rotaries": (0,) * layers,
        "layer_windows": (None,) * layers,
        "activation": act,
    }
    return ModelConfig(
        vocab_size=reader.size("vocab_size"),
        num_layers=layers,
        embed_dim=dim,
        mlp_dim=reader.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=reader.size("max_position_embeddings"),
        norm_eps=reader.positive("rms_norm_eps"),
        tie_embeddings=reader.take("tie_word_embeddings", bool),
        **{**shared, **switches},
    )


def _head_dim(reader: ConfigReader) -> int:
    heads, dim = reader.size("num_attention_heads"), reader.size("hidden_size")
    head_dim = reader.optional_size("head_dim") or max(1, dim // heads)
    if head_dim % 2:
        raise reader.error(f"head_dim {head_dim} is odd; rotary embedding needs pairs")
    return head_dim


def _attention_biases(reader: ConfigReader) -> tuple[str, ...]:
    return ("qkv", "out") if reader.take("attention_bias", bool) else ()


def _all_biases(reader: ConfigReader) -> tuple[str, ...]:
    return (*_attention_biases(reader), *(("mlp",) if reader.take("mlp_bias", bool) else ()))


def _window_everywhere(reader: ConfigReader) -> tuple[int | None, ...]:
    window = reader.optional_size("sliding_window")
    return (window,) * reader.size("num_hidden_layers", MAX_LAYERS)


def _two_rotaries(reader: ConfigReader, windows: tuple[int | None, ...], sliding_theta: str) -> dict[str, Any]:
    """Full layers and sliding ones have rotary embeddings of their own."""
    head_dim = _head_dim(reader)
    full = read_rotary(reader, head_dim, part=FULL)
    sliding = read_rotary(reader, head_dim, part=SLIDING, theta=sliding_theta)
    kinds = tuple(int(window is not None) for window in windows)
    return {"rotaries": (full, sliding), "layer_rotaries": kinds, "layer_windows": windows}


def _qwen_window(reader: ConfigReader) -> int | None:
    """Qwen's configs give a window even where it is switched off."""
    window = reader.optional("sliding_window", int)
    return reader.size("sliding_window") if window and reader.take("use_sliding_window", bool) else None


def _upper_windows(reader: ConfigReader) -> tuple[int | None, ...]:
    """Qwen 2 and 3: the layers from `max_window_layers` on slide."""
    window, first = _qwen_window(reader), reader.take("max_window_layers", int)
    reader.ignore("use_sliding_window")
    return read_windows(reader, window, lambda layer: layer >= first)


def read_llama(reader: ConfigReader) -> ModelConfig:
    return _decoder(reader, biases=_all_biases(reader))


def read_mistral(reader: ConfigReader) -> ModelConfig:
    return _decoder(reader, layer_windows=_window_everywhere(reader))


def read_mixtral(reader: ConfigReader) -> ModelConfig:
    reader.fixed("router_jitter_noise", 0)
    experts = Experts(
        num_experts=reader.size("num_experts"),
        num_per_token=_per_token(reader),
        mlp_dim=reader.size("intermediate_size"),
        normalize=True,
        balance_coef=reader.take("router_aux_loss_coef", float),
    )
    return _decoder(reader, layer_windows=_window_everywhere(reader), experts=experts)


def _per_token(reader: ConfigReader) -> int:
    visited, there = reader.size("num_experts_per_tok"), reader.size("num_experts")
    if visited > there:
        raise reader.error(f"each token visits {visited} experts, but there are {there}")
    return visited


def read_qwen2(reader: ConfigReader) -> ModelConfig:
    return _decoder(reader, biases=("qkv",), layer_windows=_upper_windows(reader))


def read_qwen3(reader: ConfigReader) -> ModelConfig:
    windows = _upper_windows(reader)
    return _decoder(reader, biases=_attention_biases(reader), qk_norm="head", layer_windows=windows)


def _qwen_experts(reader: ConfigReader, shared_mlp_dim: int = 0) -> Experts:
    # Which layers are sparse would have to be a difference in structure; every published model has experts in all.
    reader.fixed("decoder_sparse_step", 1)
    reader.fixed("mlp_only_layers", [])
    return Experts(
        num_experts=reader.size("num_experts"),
        num_per_token=_per_token(reader),
        mlp_dim=reader.size("moe_intermediate_size"),
        normalize=reader.take("norm_topk_prob", bool),
        shared_mlp_dim=shared_mlp_dim,
        balance_coef=reader.take("router_aux_loss_coef", float),
    )


def read_qwen2_moe(reader: ConfigReader) -> ModelConfig:
    """Its default lets every other layer below `max_window_layers` slide."""
    window, end = _qwen_window(reader), reader.take("max_window_layers", int)
    reader.ignore("use_sliding_window")
    return _decoder(
        reader,
        biases=("qkv",) if reader.take("qkv_bias", bool) else (),
        layer_windows=read_windows(reader, window, lambda layer: layer % 2 == 0 and layer < end),
        experts=_qwen_experts(reader, reader.size("shared_expert_intermediate_size")),
    )


def read_qwen3_moe(reader: ConfigReader) -> ModelConfig:
    window = _qwen_window(reader)
    reader.ignore("use_sliding_window", "max_window_layers")
    return _decoder(
        reader,
        biases=_attention_biases(reader),
        qk_norm="head",
        layer_windows=(window,) * reader.size("num_hidden_layers", MAX_LAYERS),
        experts=_qwen_experts(reader),
    )


def _gemma(reader: ConfigReader, **switches: Any) -> ModelConfig:
    """Gemma 1; what it shares with its successors: zero-centred norms, scaled embeddings."""
    reader.fixed("use_bidirectional_attention", False)
    config = _decoder(reader, biases=_attention_biases(reader), norm_offset=1.0, **switches)
    return dataclasses.replace(config, embed_scale=config.embed_dim**0.5)


def read_gemma1(reader: ConfigReader) -> ModelConfig:
    newer = reader.optional("hidden_activation", str)
    config = _gemma(reader, activation="hidden_activation" if newer else "hidden_act")
    # Its first releases say gelu and mean the tanh approximation.
    gelu = "gelu_pytorch_tanh" if config.activation == "gelu" else config.activation
    return dataclasses.replace(config, activation=gelu)


def read_gemma2(reader: ConfigReader) -> ModelConfig:
    window = reader.optional_size("sliding_window")
    reader.ignore("hidden_act")
    return _gemma(
        reader,
        activation="hidden_activation",
        norms="both",
        attention_scale=reader.size("query_pre_attn_scalar") ** -0.5,
        layer_windows=read_windows(reader, window, lambda layer: layer % 2 == 0),
        attention_softcap=reader.optional_positive("attn_logit_softcapping"),
        logit_softcap=reader.optional_positive("final_logit_softcapping"),
    )


def read_gemma3(reader: ConfigReader) -> ModelConfig:
    """Sliding layers have a rotary base of their own, and no scaling."""
    window = reader.optional_size("sliding_window")
    period = reader.size("sliding_window_pattern")
    reader.ignore("hidden_act")
    reader.fixed("attn_logit_softcapping")  # transformers does not apply it
    windows = read_windows(reader, window, lambda layer: (layer + 1) % period > 0)
    return _gemma(
        reader,
        activation="hidden_activation",
        norms="both",
        qk_norm="head",
        attention_scale=reader.size("query_pre_attn_scalar") ** -0.5,
        **_two_rotaries(reader, windows, "rope_local_base_freq"),
        logit_softcap=reader.optional_positive("final_logit_softcapping"),
    )


def read_phi3(reader: ConfigReader) -> ModelConfig:
    reader.ignore("partial_rotary_factor", "original_max_position_embeddings")  # read with the rotary settings
    # Its first releases call the same rule by two other names.
    rotary = read_rotary(reader, _head_dim(reader), aliases={"su": "longrope", "yarn": "longrope"})
    return _decoder(reader, rotaries=(rotary,), layer_windows=_window_everywhere(reader))


def read_smollm3(reader: ConfigReader) -> ModelConfig:
    """Every `no_rope_layer_interval`-th layer has no position; where windows are on, those are the sliding ones."""
    layers, period = reader.size("num_hidden_layers", MAX_LAYERS), reader.size("no_rope_layer_interval")
    turned = reader.optional("no_rope_layers", list) or [int((i + 1) % period > 0) for i in range(layers)]
    if len(turned) < layers or any(flag not in (0, 1) for flag in turned):
        raise reader.error(f"no_rope_layers must hold 0 or 1 for each of {layers} layers")
    windows = read_windows(reader, _qwen_window(reader), lambda layer: not turned[layer])
    reader.ignore("use_sliding_window", "max_window_layers")
    rotary = read_rotary(reader, _head_dim(reader))
    return _decoder(
        reader,
        biases=_all_biases(reader),
        rotaries=(rotary, Rotary(dim=rotary.dim, kind="none")),
        layer_rotaries=tuple(1 - flag for flag in turned[:layers]),
        layer_windows=windows,
    )


def read_olmo2(reader: ConfigReader) -> ModelConfig:
    return _decoder(reader, biases=_attention_biases(reader), norms="post", qk_norm="projection")


def read_olmo3(reader: ConfigReader) -> ModelConfig:
    """Three of four layers slide; only the full ones have their rotary embedding scaled."""
    windows = read_windows(reader, reader.optional_size("sliding_window"), lambda layer: (layer + 1) % 4 > 0)
    switches = _two_rotaries(reader, windows, "rope_theta")
    return _decoder(reader, biases=_attention_biases(reader), norms="post", qk_norm="projection", **switches)


def read_granite(reader: ConfigReader) -> ModelConfig:
    return _decoder(
        reader,
        biases=_all_biases(reader),
        attention_scale=reader.positive("attention_multiplier"),
        embed_scale=reader.positive("embedding_multiplier"),
        residual_scale=reader.positive("residual_multiplier"),
        logit_divisor=reader.positive("logits_scaling"),
    )
