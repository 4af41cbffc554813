"""FLOPs of a model in training."""

import pytest

from jaxpost.models.families import read_config
from jaxpost.models.flops import matrix_parameters, train_flops
from tests.conftest import TINY_LLAMA

LLAMA_8B = {
    **TINY_LLAMA,
    **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
}


def test_weights_and_flops_of_a_known_model():
    config = read_config(LLAMA_8B, "llama")
    assert matrix_parameters(config) == 8_030_261_248 - 128256 * 4096 - 65 * 4096  # all but the embedding and the norms
    per_token = 6 * matrix_parameters(config) + 6 * 32 * 4096 * 8192
    assert train_flops(config, 8192, 8192) == pytest.approx(8192 * per_token)
