"""What a model computes in training."""

from jaxpost.models.config import ModelConfig


def train_flops(config: ModelConfig, num_tokens: int, length: int, *, is_frozen: bool = False) -> float:
    """Of the forward and backward pass over texts of `length` tokens, nothing computed twice.

    6 a token and weight, and 12 L H d a pair of tokens of which one sees the other (Chowdhery et al., 2022, "PaLM",
    arXiv:2204.02311, appendix B, where every pair counts). Frozen weights have no gradient, which leaves 4; the
    adapters on them are not counted.
    """
    pairs = 12 * config.num_layers * config.num_heads * config.head_dim * length / 2
    return num_tokens * ((4.0 if is_frozen else 6.0) * matrix_parameters(config) + pairs)


def matrix_parameters(config: ModelConfig) -> int:
    """Weights that a token is multiplied with, those of the experts that it does not visit left out."""
    dim, heads = config.embed_dim, config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    width = config.mlp_dim
    if experts := config.experts:
        width = experts.num_per_token * experts.mlp_dim + experts.shared_mlp_dim
    return config.num_layers * dim * (heads + 3 * width) + dim * config.vocab_size
