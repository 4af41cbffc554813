"""What a decoder is made of, as numbers and switches; read from HF's `config.json` by `families`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding: how fast each pair of head dimensions turns; see `models.rotary`.

    Attributes:
        dim: head dimensions that turn, the first ones; the others are left alone.
        theta: base of the frequencies.
        kind: `default`, `linear`, `dynamic`, `llama3`, `yarn`, `longrope`, or `none` (no position at all).
        factor: how many times longer than in training a text may be.
        original_max_positions: longest text of the first training.
        attention_factor: multiplies cosine and sine.
        low_freq_factor, high_freq_factor: llama3's bounds, in turns.
        beta_fast, beta_slow, truncate: yarn's bounds, in turns, and whether they are rounded to whole dimensions.
        short_factors, long_factors: longrope's divisors, one a pair, up to and beyond `original_max_positions`.
    """

    dim: int
    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 8192
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long the text is."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A sparse mixture of MLPs in place of one; see `models.moe`.

    Attributes:
        num_experts: E.
        num_per_token: experts that each token visits.
        mlp_dim: F of one expert.
        normalize: the visited experts' weights sum to one.
        shared_mlp_dim: F of a gated expert that every token visits; 0 for none.
        balance_coef: the model's own coefficient of the load-balancing loss.
    """

    num_experts: int
    num_per_token: int
    mlp_dim: int
    normalize: bool
    shared_mlp_dim: int = 0
    balance_coef: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a decoder-only language model.

    Attributes:
        vocab_size, num_layers, embed_dim, mlp_dim, num_heads, num_kv_heads, head_dim: sizes V, L, D, F, H, K and d.
        max_positions: longest text that the model was made for.
        norm_eps: added to the mean square in norms.
        attention_scale: multiplies the scores.
        rotaries: the rotary embeddings in use.
        layer_rotaries: which of them each layer takes, [L].
        layer_windows: tokens that each layer sees, itself included, [L]; None for all.
        activation: of the gated MLP, by HF's name.
        tie_embeddings: the head is the transposed embedding.
        biases: which linear layers have one: `qkv`, `out` (of attention), `mlp`.
        norms: where a block normalises: its parts' inputs (`pre`), their outputs (`post`), or `both`.
        norm_offset: added to the stored scales of norms.
        qk_norm: queries and keys are normalised by `head`, over the whole `projection`, or not (`none`).
        embed_scale, residual_scale: multiply embeddings, and what a part adds to the residual stream.
        logit_divisor: divides the logits.
        attention_softcap, logit_softcap: bound c of scores and logits, as c tanh(x / c); None for none.
        experts: the mixture that takes the MLP's place.
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
    attention_scale: float
    rotaries: tuple[Rotary, ...]
    layer_rotaries: tuple[int, ...]
    layer_windows: tuple[int | None, ...]
    activation: str = "silu"
    tie_embeddings: bool = False
    biases: tuple[str, ...] = ()
    norms: str = "pre"
    norm_offset: float = 0.0
    qk_norm: str = "none"
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    experts: Experts | None = None
    hf: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def reads_branches(self) -> bool:
        """Whether a prompt that is read once for several completions gives what it gives when it is read for each.

        Otherwise the routers of experts see its tokens less often, or its keys are turned for the length of one text.
        """
        return self.experts is None and not self.turns_by_length

    @property
    def turns_by_length(self) -> bool:
        """Whether keys are turned for the length of the text that they are part of."""
        return any(rotary.by_length for rotary in self.rotaries)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How the same mathematics is carried out; it never changes what a model is.

    Attributes:
        dtype: of activations and matmuls; parameters are cast to it where they are used.
        remat: what the backward pass recomputes, a name of `models.remat`.
        attention: kernel name, see `models.attention`.
        branches: whether rows may hold branches, which not every kernel of attention knows.
    """

    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    branches: bool = True
