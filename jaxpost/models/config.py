"""What a decoder is made of, as numbers and switches; read from HF's `config.json` by `families`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding: how fast each pair of head dimensions turns.

    `kind` is `default`, `linear` (positions divided by `factor`) or `llama3` (low frequencies divided by `factor`,
    high ones kept, a smooth step between them).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a decoder-only language model.

    Attributes:
        vocab_size, num_layers, embed_dim, mlp_dim, num_heads, num_kv_heads, head_dim: sizes V, L, D, F, H, K and d.
        max_positions: longest sequence that the model was trained for.
        activation: of the gated MLP, by HF's name.
        tie_embeddings: the head is the transposed embedding.
        attention_bias, mlp_bias: biases on q, k, v and o; on gate, up and down.
        hf: the `config.json` that this was read from; an export writes it back.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str = "silu"
    rotary: Rotary = Rotary()
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hf: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How the same mathematics is carried out; it never changes what a model is.

    Attributes:
        dtype: of activations and matmuls; parameters are cast to it where they are used.
        remat: what the backward pass recomputes: `none`, `dots` (keep matmul results) or `full` (keep layer inputs).
        attention: kernel name, see `models.attention`.
    """

    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
