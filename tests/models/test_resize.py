"""Growing the vocabulary: old rows stay, new ones are the mean, on any mesh and in any dtype."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxpost import from_pretrained, save_pretrained
from jaxpost.errors import ConfigError
from jaxpost.models.config import Compute
from jaxpost.models.families import read_config
from jaxpost.models.hf import place
from jaxpost.models.resize import resize_embeddings
from jaxpost.models.transformer import Decoder
from jaxpost.sharding import make_mesh
from tests.conftest import TINY_LLAMA, make_model

TOKENS = np.array([[5, 9, 300, 7]], np.int32)


@pytest.mark.parametrize("tied", [True, False])
def test_old_logits_stay_and_new_ones_are_their_mean(tied):
    model = make_model(tie_word_embeddings=tied)
    before = model(TOKENS)
    embedding = np.asarray(model.embed.embedding[...])
    assert resize_embeddings(model, 321, multiple=8) is model
    assert model.embed.embedding[...].shape == (328, 32)
    np.testing.assert_array_equal(model.embed.embedding[...][:320], embedding)
    mean = embedding.mean(0, dtype=np.float64)
    np.testing.assert_allclose(model.embed.embedding[...][320:], np.tile(mean, (8, 1)), atol=1e-7)
    after = model(np.concatenate([TOKENS, TOKENS]))[:1]
    assert after.shape == (1, 4, 328)
    np.testing.assert_allclose(after[..., :320], before, atol=1e-6)
    # The logits are linear in the rows (of the embedding, or of the head's own columns).
    np.testing.assert_allclose(after[..., 320:], np.tile(before.mean(-1, keepdims=True), 8), atol=1e-6)
    assert np.isfinite(model(np.array([[327, 320]], np.int32))).all()


def test_config_and_file_follow_and_the_old_config_does_not():
    model = make_model()
    old = model.config
    resize_embeddings(model, 384)
    assert model.config == dataclasses.replace(old, vocab_size=384)
    assert model.layers.config == model.config
    assert model.config.hf == {**TINY_LLAMA, "vocab_size": 384}
    assert (old.vocab_size, old.hf) == (320, TINY_LLAMA)


def test_the_same_size_changes_nothing_and_less_is_refused():
    model = make_model()
    embedding, config = model.embed.embedding, model.config
    assert resize_embeddings(model, 320, multiple=64).embed.embedding is embedding
    assert resize_embeddings(model, 300, multiple=64).config is config
    with pytest.raises(ConfigError, match="the model has 320 tokens and cannot shrink to 256"):
        resize_embeddings(model, 256, multiple=64)


def test_a_reward_head_has_no_columns_for_tokens():
    model = Decoder(read_config(TINY_LLAMA, "tiny"), head="reward", rngs=nnx.Rngs(0))
    before = model(TOKENS)
    resize_embeddings(model, 330)
    assert model.embed.embedding[...].shape == (330, 32) and model.head.kernel[...].shape == (32, 1)
    np.testing.assert_array_equal(model(TOKENS), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_mean_is_taken_in_float32(dtype):
    """Summed in bfloat16, 320 ones would end at 256."""
    model = make_model(tie_word_embeddings=False)
    model.embed.embedding = nnx.Param(jnp.ones((320, 32), dtype))
    model.head.kernel = nnx.Param(jnp.full((32, 320), 300, dtype))
    resize_embeddings(model, 321)
    for parameter, value in ((model.embed.embedding, 1), (model.head.kernel, 300)):
        assert parameter[...].dtype == dtype
        np.testing.assert_array_equal(np.asarray(parameter[...], np.float32), value)


@pytest.mark.parametrize("spec", ["fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2", "tensor=8"])
def test_on_a_mesh_parameters_lie_as_the_table_says(spec):
    mesh = make_mesh(spec)
    model, expected = make_model(tie_word_embeddings=False), make_model(tie_word_embeddings=False)
    resize_embeddings(place(model, Compute(), mesh), 384)
    resize_embeddings(expected, 384)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    assert model.embed.embedding[...].sharding.shard_shape((384, 32)) == (384 // tensor, 32 // fsdp)
    assert model.head.kernel[...].sharding.shard_shape((32, 384)) == (32 // fsdp, 384 // tensor)
    np.testing.assert_allclose(model.embed.embedding[...], expected.embed.embedding[...], atol=1e-7)
    np.testing.assert_allclose(model.head.kernel[...], expected.head.kernel[...], atol=1e-7)


def test_a_size_that_the_mesh_begins_to_divide_is_split():
    mesh = make_mesh("tensor=8")
    model = place(make_model(vocab_size=301), Compute(), mesh)
    assert model.embed.embedding[...].sharding.shard_shape((301, 32)) == (301, 32)
    resize_embeddings(model, 302, multiple=64)
    assert model.embed.embedding[...].sharding.shard_shape((320, 32)) == (40, 32)


@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_model_is_written_and_read_back(tied, tmp_path):
    model = resize_embeddings(make_model(tie_word_embeddings=tied), 384)
    save_pretrained(model, None, tmp_path / "grown")
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["vocab_size"] == 384
    tensors = load_file(tmp_path / "grown" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (384, 32)
    assert ("lm_head.weight" in tensors) is not tied
    again = from_pretrained(tmp_path / "grown")
    for ours, theirs in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
