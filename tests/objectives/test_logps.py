from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpost.objectives import logps, vocabulary
from jaxpost.objectives.logps import next_tokens, score_batch, score_tokens, sum_batch
from jaxpost.objectives.sft import SFT, token_losses
from jaxpost.sharding import make_mesh, shardings
from tests.conftest import make_batch, make_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 5, 24])
def test_chunks_equal_full_logits_in_value_and_gradient(tied, chunk):
    graphdef, state = nnx.split(make_model(tie_word_embeddings=tied))
    batch = jax.tree.map(jnp.asarray, make_batch(rows=3))
    weight = jnp.sin(jnp.arange(24.0))

    def chunked(state):
        model = nnx.merge(graphdef, state)
        targets, mask = next_tokens(batch)
        h, _ = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
        scores = score_tokens(
            model, h, targets, mask, temperature=0.7, entropy_gradient=True, details=True, chunk=chunk
        )
        return jnp.sum(scores.logps * weight) + jnp.sum(scores.entropy), scores

    def naive(state):
        model = nnx.merge(graphdef, state)
        targets, mask = next_tokens(batch)
        logits = model(batch["tokens"], batch["positions"], batch["segments"]) / 0.7
        logps = jax.nn.log_softmax(logits)
        entropy = -jnp.sum(jnp.exp(logps) * logps, axis=-1) * mask
        chosen = jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0] * mask
        top = (jnp.argmax(logits, axis=-1) == targets) * mask
        collision = jax.nn.logsumexp(2 * logps, axis=-1) * mask
        return jnp.sum(chosen * weight) + jnp.sum(entropy), (chosen, entropy, top, logits.mean(-1) * mask, collision)

    (_, scores), gradient = jax.jit(jax.value_and_grad(chunked, has_aux=True))(state)
    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(naive, has_aux=True))(state)
    for a, b in zip(scores, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spec", ["fsdp=8", "data=2,fsdp=4", "data=8", "fsdp=2,expert=2,context=2"])
def test_a_head_in_pieces_says_the_same(spec, tied, monkeypatch):
    graphdef, state = nnx.split(make_model(tie_word_embeddings=tied))
    batch = jax.tree.map(jnp.asarray, make_batch(rows=8))
    weight = jnp.sin(jnp.arange(24.0))

    def total(state, chunk):
        model = nnx.merge(graphdef, state)
        targets, mask = next_tokens(batch)
        h, _ = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
        options = {"temperature": 0.7, "entropy_gradient": True, "details": True, "chunk": chunk}
        scores = score_tokens(model, h, targets, mask, **options)
        return jnp.sum(scores.logps * weight) + jnp.sum(scores.entropy), scores

    state = nnx.to_pure_dict(state)
    run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    (_, expected), expected_gradient = run(state, 5)
    mesh = make_mesh(spec)
    monkeypatch.setattr(vocabulary, "PIECE_BYTES", 4 * 32 * 64)  # 64 of 320 tokens
    with jax.set_mesh(mesh):
        sliced = jax.device_put(state, shardings(state, mesh))
        (_, scores), gradient = run(sliced, 5)
        tree = jax.tree.structure(nnx.merge(graphdef, sliced).unembedding())
        scoring = vocabulary.Scoring(tree, size=5, width=320)
        assert vocabulary.in_pieces(scoring, jnp.zeros((8, 24, 32))).pieces == 5
    for a, b in zip(scores, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_no_device_has_a_whole_head_nor_its_gradient(monkeypatch):
    """A trained head is gathered, and its gradient given back, piece by piece."""
    graphdef, state = nnx.split(make_model(tie_word_embeddings=False, vocab_size=4096))
    mesh, state = make_mesh("fsdp=8"), nnx.to_pure_dict(state)

    def total(state, h, targets):
        return jnp.sum(score_tokens(nnx.merge(graphdef, state), h, targets, targets > 0).logps)

    h, targets = jnp.ones((8, 4, 32)), jnp.ones((8, 4), jnp.int32)
    found = []
    for size in (10**9, 4 * 32 * 256):
        monkeypatch.setattr(vocabulary, "PIECE_BYTES", size)
        with jax.set_mesh(mesh):
            sliced = jax.device_put(state, shardings(state, mesh))
            found.append(jax.jit(jax.grad(total)).lower(sliced, h, targets).compile().as_text())
    assert "f32[32,4096]" in found[0] and "f32[32,4096]" not in found[1]


def test_a_frozen_head_on_many_devices_has_the_logits_of_one_chunk(monkeypatch):
    monkeypatch.setattr(vocabulary, "PIECE_BYTES", 4 * 32 * 256)  # of a trained one
    monkeypatch.setattr(logps, "CHUNK_BYTES_CPU", 4 * 2 * 4096)  # two tokens
    graphdef, state = nnx.split(make_model(tie_word_embeddings=False, vocab_size=4096))
    mesh, state = make_mesh("fsdp=8"), nnx.to_pure_dict(state)

    def total(h, state, targets):
        return jnp.sum(score_tokens(nnx.merge(graphdef, state), h, targets, targets > 0).logps)

    with jax.set_mesh(mesh):
        sliced = jax.device_put(state, shardings(state, mesh))
        given = jnp.ones((8, 16, 32)), sliced, jnp.ones((8, 16), jnp.int32)
        program = jax.jit(jax.grad(total)).lower(*given).compile().as_text()
    assert "f32[2,4096]" in program and "f32[16,4096]" not in program


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_frozen_head_gives_the_same_gradient(chunk):
    model, batch = make_model(tie_word_embeddings=False), jax.tree.map(jnp.asarray, make_batch(rows=3))
    targets, mask = next_tokens(batch)
    h, _ = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
    graphdef, state = nnx.split(model)
    weight = jnp.sin(jnp.arange(24.0))

    def total(h, state):
        scores = score_tokens(nnx.merge(graphdef, state), h, targets, mask, temperature=0.7, chunk=chunk)
        return jnp.sum(scores.logps * weight) + jnp.sum(scores.entropy), scores

    (_, frozen), alone = jax.jit(jax.value_and_grad(total, has_aux=True))(h, state)
    (_, trained), (beside, _) = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(h, state)
    np.testing.assert_allclose(alone, beside, atol=1e-6)
    for a, b in zip(frozen, trained, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_logits_of_a_frozen_head_are_computed_once():
    model = make_model()
    graphdef, state = nnx.split(model)
    h, targets, mask = jnp.ones((2, 4, 32)), jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4), bool)

    def total(h, state):
        return jnp.sum(score_tokens(nnx.merge(graphdef, state), h, targets, mask).logps)

    def products(argnums):
        return str(jax.make_jaxpr(jax.grad(total, argnums=argnums))(h, state)).count("dot_general")

    assert products(0) == 2  # the logits, and the gradient of h
    assert products((0, 1)) == 4  # the logits twice, and two gradients


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("spec", [None, "data=8", "fsdp=8", "fsdp=2,context=2,tensor=2"])
def test_summed_losses_are_those_of_the_scores(spec, loss_type, tied, monkeypatch):
    """In value and gradient, also where the loss is scaled; a chunk and the last one, which is not full."""
    monkeypatch.setattr(logps, "CHUNK_BYTES_CPU", 4 * 5 * 320)
    graphdef, state = nnx.split(make_model(tie_word_embeddings=tied))
    batch, state = jax.tree.map(jnp.asarray, make_batch(rows=8)), nnx.to_pure_dict(state)

    def of_scores(state):
        scores, mask, _ = score_batch(nnx.merge(graphdef, state), batch)
        return 3 * jnp.sum(jnp.where(mask, token_losses(scores.logps, loss_type), 0.0)), (scores, 0.0)

    def of_sum(state):
        model = nnx.merge(graphdef, state)
        mean, scores, mask, _ = sum_batch(model, batch, partial(token_losses, loss_type=loss_type))
        return 3 * mean.total, (scores, mean.count - jnp.sum(mask))

    expected = jax.jit(jax.value_and_grad(of_scores, has_aux=True))(state)
    mesh = make_mesh(spec, jax.devices()[: 1 if spec is None else 8])
    with jax.set_mesh(mesh):
        sliced = jax.device_put(state, shardings(state, mesh))
        found = jax.jit(jax.value_and_grad(of_sum, has_aux=True))(sliced)
        alone = jax.jit(of_sum)(sliced)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-5)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-5)


def test_the_logits_of_a_sum_are_computed_once():
    model, batch = make_model(), jax.tree.map(jnp.asarray, make_batch(rows=2))
    weights, tree = jax.tree.flatten(model.unembedding())
    scoring, h = vocabulary.Scoring(tree, size=24, width=320), jnp.ones((2, 24, 32))

    def total(h, weights):
        return vocabulary.sum_losses(scoring, jnp.negative, weights, h, batch["tokens"], jnp.full(2, 24))[0].total

    def products(argnums):
        return str(jax.make_jaxpr(jax.grad(total, argnums=argnums))(h, weights)).count("dot_general")

    assert products(0) == 2  # the logits, and the gradient of h
    assert products((0, 1)) == 3  # and that of the head


def test_entropy_carries_no_gradient_unless_asked():
    model = make_model()
    batch = jax.tree.map(jnp.asarray, make_batch(rows=2))
    targets, mask = next_tokens(batch)
    h, _ = model.hidden(batch["tokens"], batch["positions"], batch["segments"])

    def entropy(h, asked):
        return jnp.sum(score_tokens(model, h, targets, mask, entropy_gradient=asked).entropy)

    assert not np.any(jax.grad(entropy)(h, False))
    assert np.any(jax.grad(entropy)(h, True))


def test_nothing_scored_is_zero_and_finite():
    model = make_model()
    h = jnp.ones((2, 4, 32))
    none = jnp.zeros((2, 4), bool)

    def total(h):
        return jnp.sum(score_tokens(model, h, jnp.zeros((2, 4), jnp.int32), none).logps)

    value, gradient = jax.value_and_grad(total)(h)
    assert value == 0
    assert not np.any(gradient)


def test_no_token_is_predicted_across_documents():
    batch = {
        "tokens": jnp.asarray([[5, 6, 7, 8, 9, 0]]),
        "segments": jnp.asarray([[1, 1, 2, 2, 2, 0]]),
        "loss_mask": jnp.ones((1, 6)),
    }
    targets, mask = next_tokens(batch)
    assert targets[0, :5].tolist() == [6, 7, 8, 9, 0]
    assert mask.tolist() == [[True, False, True, True, False, False]]


def test_dft_weights_each_token_by_its_own_probability():
    model, batch = make_model(), jax.tree.map(jnp.asarray, make_batch(rows=2))
    targets, mask = next_tokens(batch)
    logps = jax.nn.log_softmax(model(batch["tokens"], batch["positions"], batch["segments"]))
    chosen = jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
    loss, _ = SFT(loss_type="dft").loss(model, batch)
    np.testing.assert_allclose(loss.total, -jnp.sum(jnp.exp(chosen) * chosen * mask), rtol=1e-5)
