"""A `.gguf` file seen as a Hugging Face checkpoint: its config, its tensors and its tokenizer.

Source: llama.cpp's convert_hf_to_gguf.py, whose renaming and reordering is undone here.
"""

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpost.models.gguf_architectures import ARCHITECTURES, Architecture, Row, sizes
from jaxpost.models.gguf_file import CONVERT, HF_FOLDER, Metadata, Tensor, dequantize, open_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# (GGUF key after the architecture's name, Hugging Face config key, type)
_CONFIG_KEYS = (
    ("embedding_length", "hidden_size", int),
    ("feed_forward_length", "intermediate_size", int),
    ("block_count", "num_hidden_layers", int),
    ("attention.head_count", "num_attention_heads", int),
    ("context_length", "max_position_embeddings", int),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
)
_TOKEN_IDS = (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
# Keys that say nothing about the maths; any other key of the architecture that is not read is refused.
_IGNORED = ("tensor_data_layout", "rope.scaling.finetuned")
# A tensor that stands for a config entry: the factors of Llama 3's rotary scaling.
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFCheckpoint:
    """A GGUF file seen as a Hugging Face checkpoint: HF names, HF layout [out, in].

    Attributes:
        config: what the model's HF `config.json` would hold.
        generation_config: the ids of the BOS, EOS and PAD tokens that the file names; where it names a token that
            ends a turn, too, EOS is a list of both.

    Raises:
        ConfigError: `gguf` is not installed; the file cannot be read, is damaged or contradicts itself; its
            architecture, a tensor, a quantisation or a key that changes the maths is not supported.
    """

    def __init__(self, path: str | os.PathLike):
        self._metadata, tensors = open_gguf(path)
        name = self._metadata.get("general.architecture", str)
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise self._metadata.error(f"architecture {name[:40]!r} is not supported (supported: {known}); {HF_FOLDER}")
        architecture = ARCHITECTURES[name]
        self.config = _config(self._metadata, name, architecture, tensors)
        self.generation_config = _generation_config(self._metadata, self.config)
        self._tensors = _match(self._metadata, self.config, architecture, tensors)

    def names(self) -> frozenset[str]:
        """Return the HF names of the file's tensors."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the HF shape of the tensor, [out, in] for a matrix."""
        return self._tensors[name][1].shape

    def read(self, name: str) -> np.ndarray:
        """Return the tensor in HF layout, dequantised to float32, in memory of its own."""
        row, tensor = self._tensors[name]
        weights = dequantize(tensor)
        if row.heads:
            # llama.cpp stores a head's rows as: first of half 1, first of half 2, second of half 1, ...
            split = weights.reshape(self.config[row.heads], -1, 2, weights.shape[-1])
            weights = split.swapaxes(1, 2).reshape(weights.shape)
        if row.offset:
            with np.errstate(invalid="ignore"):  # whatever is not a number in the file stays so
                weights = weights - np.float32(row.offset)
        return np.require(weights, np.float32, ["C", "W", "E"])

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Return the file's tokenizer, with its special tokens and its chat template.

        Raises:
            ConfigError: the file has no tokenizer, a damaged one, or one of a kind that is not supported.
        """
        from jaxpost.models.gguf_tokenizer import build_tokenizer

        return build_tokenizer(self._metadata, self.config["vocab_size"], self.config["max_position_embeddings"])


def _config(metadata: Metadata, name: str, architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the HF config of the file."""
    config = {"architectures": [architecture.hf_class], **architecture.config}
    for suffix, key, kind in _CONFIG_KEYS:
        config[key] = metadata.positive(f"{name}.{suffix}", kind)
    if config["num_hidden_layers"] > len(tensors):
        announced = f"{config['num_hidden_layers']} layers are announced"
        raise metadata.error(f"{announced} but only {len(tensors)} tensors are there; {CONVERT}")
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = metadata.positive(f"{name}.attention.head_count_kv", int, heads)
    if heads % config["num_key_value_heads"]:
        groups = f"{heads} heads cannot share {config['num_key_value_heads']} key-value heads"
        raise metadata.error(f"{groups}; {CONVERT}")
    config["head_dim"] = _head_dim(metadata, name, config["hidden_size"] // heads)
    config["rope_theta"] = metadata.positive(f"{name}.rope.freq_base", float, 10000.0)
    factors = tensors.get(_ROPE_FACTORS) if architecture.rope_factors else None
    scaling = _rope_scaling(metadata, name, config, factors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["vocab_size"] = _vocab_size(metadata, name, tensors)
    for key, token in _TOKEN_IDS:
        config[key] = metadata.token_id(token, config["vocab_size"])
    config |= architecture.read(metadata, config)
    unknown = set(metadata.unread(f"{name}.")) - {f"{name}.{suffix}" for suffix in _IGNORED}
    if unknown:
        raise metadata.error(f"{min(unknown)[:80]} may change the model's maths and is not supported; {HF_FOLDER}")
    return config


def _generation_config(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of the file's BOS, EOS and PAD tokens; models that chat end a turn with a token of its own."""
    ids = {key: config[key] for key, _ in _TOKEN_IDS}
    turn, eos = metadata.token_id("eot", config["vocab_size"]), ids["eos_token_id"]
    if turn is not None and turn != eos:
        ids["eos_token_id"] = turn if eos is None else [eos, turn]
    return {key: value for key, value in ids.items() if value is not None}


def _head_dim(metadata: Metadata, name: str, default: int) -> int:
    """Return the dimension of a head, which the keys, the values and the rotary embedding must share."""
    head_dim = metadata.positive(f"{name}.attention.key_length", int, default)
    value_dim = metadata.positive(f"{name}.attention.value_length", int, default)
    rotary = metadata.positive(f"{name}.rope.dimension_count", int, head_dim)
    if not rotary == head_dim == value_dim or head_dim < 2 or head_dim % 2:
        dims = f"keys {head_dim}, values {value_dim}, rotary {rotary}"
        raise metadata.error(f"head dimensions must be equal and even ({dims}); {HF_FOLDER}")
    return head_dim


def _vocab_size(metadata: Metadata, name: str, tensors: Mapping[str, Tensor]) -> int:
    """Return the number of rows of the embedding, which the metadata and the tokenizer must agree with."""
    if "token_embd.weight" not in tensors:
        raise metadata.error(f"tensor token_embd.weight is missing; {CONVERT}")
    rows = tensors["token_embd.weight"].shape[0]
    stated = metadata.positive(f"{name}.vocab_size", int, rows)
    tokens = metadata.array("tokenizer.ggml.tokens", str, default=None)
    count = rows if tokens is None else len(tokens)
    if not rows == stated == count:
        counts = f"{rows} rows of token_embd.weight, {stated} in {name}.vocab_size, {count} in tokenizer.ggml.tokens"
        raise metadata.error(f"the vocabulary has different sizes: {counts}; {CONVERT}")
    return rows


def _rope_scaling(
    metadata: Metadata, name: str, config: Mapping[str, Any], factors: Tensor | None
) -> dict[str, Any] | None:
    """Return the HF `rope_scaling`: what the metadata says, or Llama 3's if the file carries its factors."""
    key = f"{name}.rope.scaling."
    kind = metadata.get(f"{key}type", str, "none")
    if kind == "none":
        metadata.get(f"{key}factor", float, None)  # means nothing without a type
        return None if factors is None else _llama3_scaling(metadata, config, factors)
    if kind not in ("linear", "yarn") or factors is not None:
        raise metadata.error(f"{key}type {kind[:40]!r} is not supported; {HF_FOLDER}")
    scaling = {"rope_type": kind, "factor": metadata.positive(f"{key}factor", float)}
    if kind == "yarn":
        original = metadata.positive(f"{key}original_context_length", int)
        betas = {beta: metadata.positive(f"{key}yarn_{beta}", float, None) for beta in ("beta_fast", "beta_slow")}
        scaling["original_max_position_embeddings"] = original
        scaling |= {beta: value for beta, value in betas.items() if value is not None}
    return scaling


def _llama3_scaling(metadata: Metadata, config: Mapping[str, Any], tensor: Tensor) -> dict[str, Any]:
    """Return the `llama3` scaling that yields the factors in the file, the only trace that GGUF keeps of it.

    The factors [head_dim/2] give the scale of the lowest frequency; the other three parameters are those of every
    published Llama 3 model, and the factors they imply must be the file's.
    """
    scale, low, high, context = 1.0, 1.0, 4.0, 8192
    fits = tensor.shape == (config["head_dim"] // 2,)
    if fits:
        factors = dequantize(tensor)
        scale = float(factors.max())
        exponents = np.arange(0, config["head_dim"], 2) / config["head_dim"]
        turns = context / (2 * math.pi * config["rope_theta"] ** exponents)  # of each frequency in that context
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        fits = scale >= 1 and np.allclose(factors, 1 / ((1 - smooth) / scale + smooth), rtol=1e-4, atol=0.0)
    if not fits:
        raise metadata.error(f"{_ROPE_FACTORS} holds other factors than Llama 3's; {HF_FOLDER}")
    return {
        "rope_type": "llama3",
        "factor": scale,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _match(
    metadata: Metadata, config: Mapping[str, Any], architecture: Architecture, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[Row, Tensor]]:
    """Return each HF name's row and tensor, having checked that names and shapes are the architecture's."""
    dims, layers = sizes(config), config["num_hidden_layers"]
    matched, unused = {}, set(tensors) - ({_ROPE_FACTORS} if architecture.rope_factors else set())
    for row in architecture.rows:
        for layer in range(layers if "{}" in row.gguf else 1):
            name = row.gguf.format(layer)
            if name not in tensors:
                if row.optional:
                    continue
                raise metadata.error(f"tensor {name} is missing; {CONVERT}")
            found, wanted = tensors[name].shape, tuple(dims[letter] for letter in row.shape)
            if found != wanted:
                raise metadata.error(f"tensor {name} has shape {found}, its metadata says {wanted}; {CONVERT}")
            unused.remove(name)
            matched[row.hf.format(layer)] = (row, tensors[name])
    if unused:
        raise metadata.error(f"tensor {min(unused)[:80]} has no place in a {config['model_type']} model; {HF_FOLDER}")
    return matched
