"""The tiled kernel against scores written out, over rows that are one tile and rows longer than a tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.models.attention import attention
from jaxpost.models.tiles import BLOCK
from jaxpost.models.views import Places

LENGTHS = [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 44]


@pytest.fixture(params=["short", "long"])
def rows(request, monkeypatch):
    """Rows whose tiles have all keys at once, or one tile of keys after the other."""
    for name in ("WIDE", "ALONE"):
        monkeypatch.setattr(f"jaxpost.models.tiles.{name}", 8 * BLOCK if request.param == "short" else BLOCK)


def inputs(length, documents, rows=2, heads=6, kv_heads=3, dim=8):
    """Random queries, keys and values; rows of `documents` documents of random lengths and some padding."""
    rng = np.random.default_rng(length)
    shapes = [(rows, length, heads, dim), (rows, length, kv_heads, dim), (rows, length, kv_heads, dim)]
    arrays = [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes]
    positions, segments = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(1, length + 1), min(documents, length), replace=False))
        for number, (begin, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True), start=1):
            positions[row, begin:end], segments[row, begin:end] = np.arange(end - begin), number
    return arrays, Places(jnp.asarray(positions), jnp.asarray(segments))


def written_out(query, key, value, places, scale, window=None, softcap=None):
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    order = jnp.arange(query.shape[1])
    visible = (places.segments[:, :, None] == places.segments[:, None]) & (order[:, None] >= order)
    visible &= order[:, None] - order < (window or len(order))
    scores = jnp.einsum("bthd,bshd->bhts", query, key) * scale
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), value)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("documents", "window", "softcap"), [(1, None, None), (5, None, None), (2, 5, 0.7), (1, BLOCK + 3, None)]
)
def test_equals_scores_written_out(length, documents, window, softcap):
    arrays, places = inputs(length, documents)
    real = (places.segments > 0)[..., None, None]
    weight = jnp.cos(jnp.arange(arrays[0].size)).reshape(arrays[0].shape)

    def run(kernel, arrays):
        out = jnp.where(real, kernel(*arrays), 0.0)
        return jnp.sum(out * weight), out

    traced = None if window is None else jnp.asarray(window)
    ours = lambda *arrays: attention(*arrays, places, scale=0.3, window=traced, softcap=softcap)  # noqa: E731
    theirs = lambda *arrays: written_out(*arrays, places, 0.3, window, softcap)  # noqa: E731
    gradients = jax.jit(jax.grad(run, argnums=1, has_aux=True), static_argnums=0)
    (mine, out), (expected, expected_out) = gradients(ours, arrays), gradients(theirs, arrays)
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    for a, b in zip(mine, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def branching(trunk, branches):
    """A row of a trunk with branches (start, length), and where the tokens of each text written out are in it."""
    positions, segments, texts = list(range(trunk)), [1] * trunk, [list(range(trunk))]
    for number, (start, length) in enumerate(branches, start=2):
        texts.append([*range(start), *range(len(positions), len(positions) + length)])
        positions += range(start, start + length)
        segments += [number] * length
    return Places(jnp.asarray([positions]), jnp.asarray([segments])), texts


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("window", [None, 9, BLOCK + 9])
@pytest.mark.parametrize(
    ("trunk", "branches"),
    [(12, [(7, 5), (7, 1), (3, 20)]), (BLOCK + 5, [(BLOCK, 30), (20, 2 * BLOCK), (BLOCK + 5, 3), (1, 200)])],
)
def test_a_branch_sees_what_its_text_written_out_would(trunk, branches, window):
    places, texts = branching(trunk, branches)
    (query, key, value), _ = inputs(places.positions.shape[1], 1, rows=1)
    limit = None if window is None else jnp.asarray(window)
    shared = jax.jit(lambda *x: attention(*x, places, scale=0.3, window=limit))
    weight = jnp.cos(jnp.arange(query.size)).reshape(query.shape)
    gradient = jax.grad(lambda x: jnp.sum(shared(*x) * weight))((query, key, value))

    def written(arrays):
        outs = []
        for text, own in zip(texts, [trunk, *(length for _, length in branches)], strict=True):
            alone = Places(jnp.arange(len(text))[None], jnp.ones((1, len(text)), jnp.int32))
            outs.append(written_out(*(x[:, np.asarray(text)] for x in arrays), alone, 0.3, window)[:, -own:])
        return jnp.concatenate(outs, axis=1)

    np.testing.assert_allclose(shared(query, key, value), written((query, key, value)), atol=2e-6)
    expected = jax.grad(lambda x: jnp.sum(written(x) * weight))((query, key, value))
    for a, b in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.usefixtures("rows")
def test_documents_have_exactly_no_influence_on_each_other():
    arrays, places = inputs(2 * BLOCK, 4, rows=1)
    chosen = (places.segments == 2)[..., None, None]
    gradient = jax.grad(lambda arrays: jnp.sum(jnp.where(chosen, attention(*arrays, places, scale=0.3), 0.0)))(arrays)
    for array in gradient:
        assert not np.any(np.where(chosen, 0.0, array))
        assert np.any(array)


def test_tiles_beyond_the_window_are_not_even_read(monkeypatch):
    monkeypatch.setattr("jaxpost.models.tiles.ALONE", BLOCK)
    (query, key, value), _ = inputs(3 * BLOCK, 1, rows=1)
    order = jnp.arange(3 * BLOCK)
    places = Places(order[None], jnp.ones((1, 3 * BLOCK), jnp.int32))
    value = jnp.where((order < BLOCK)[:, None, None], jnp.nan, value)
    out = attention(query, key, value, places, scale=0.3, window=jnp.asarray(BLOCK))
    assert np.all(np.isfinite(out[:, 2 * BLOCK :]))
    assert np.all(np.isnan(out[:, :BLOCK]))


def test_unknown_kernel_is_named():
    arrays, places = inputs(4, 1)
    with pytest.raises(ConfigError, match="attn_implementation is 'xl' \\(did you mean 'xla'\\?\\)"):
        attention(*arrays, places, scale=1.0, kernel="xl")
