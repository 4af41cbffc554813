import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.models.config import Compute
from jaxpost.models.remat import POLICIES
from tests.conftest import make_model


def logits(model, tokens, **columns):
    return np.asarray(jax.jit(lambda tokens, columns: model(tokens, **columns))(tokens, columns))


def test_decode_equals_forward_for_ragged_prompts():
    model = make_model()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 320, (2, 9)))
    full = logits(model, tokens)
    h, cache = model.prefill(tokens[:, :5], jnp.array([5, 3]), 9)
    np.testing.assert_allclose(model.unembed(h), np.stack([full[0, 4], full[1, 2]]), atol=1e-5)
    for step in range(4):
        h, cache = model.decode(jnp.stack([tokens[0, 5 + step], tokens[1, 3 + step]]), cache)
        np.testing.assert_allclose(model.unembed(h), np.stack([full[0, 5 + step], full[1, 3 + step]]), atol=1e-5)


def test_packed_documents_do_not_see_each_other():
    model = make_model()
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 320, 7), rng.integers(0, 320, 5)
    packed = jnp.asarray(np.concatenate([first, second]))[None]
    positions = jnp.asarray(np.concatenate([np.arange(7), np.arange(5)]))[None]
    segments = jnp.asarray([[1] * 7 + [2] * 5])
    together = logits(model, packed, positions=positions, segments=segments)
    np.testing.assert_allclose(together[:, :7], logits(model, jnp.asarray(first)[None]), atol=1e-5)
    np.testing.assert_allclose(together[:, 7:], logits(model, jnp.asarray(second)[None]), atol=1e-5)


def test_padding_changes_nothing():
    model = make_model()
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 320, (1, 6)))
    padded = jnp.pad(tokens, ((0, 0), (0, 4)), constant_values=7)
    segments = jnp.asarray([[1] * 6 + [0] * 4])
    np.testing.assert_allclose(logits(model, padded, segments=segments)[:, :6], logits(model, tokens), atol=1e-5)


@pytest.mark.parametrize("remat", POLICIES)
def test_remat_changes_no_gradient(remat):
    model = make_model()
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 320, (2, 8)))

    def gradient(remat):
        model.compute = Compute(remat=remat)
        return jax.grad(lambda h: jnp.sum(jnp.sin(h(tokens))))(model)

    plain = jax.tree.leaves(gradient("none"))
    for a, b in zip(plain, jax.tree.leaves(gradient(remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(a).max())  # some are 55 large


def test_bf16_compute_keeps_float32_logits_and_parameters():
    model = make_model()
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, 320, (2, 8)))
    exact = logits(model, tokens)
    model.compute = Compute(dtype="bfloat16")
    rough = logits(model, tokens)
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.05
