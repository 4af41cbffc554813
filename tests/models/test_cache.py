"""One more token and a cache against the attention of whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.compilation import as_written
from jaxpost.models.attention import attention
from jaxpost.models.cache import BLOCK, Cache
from jaxpost.models.views import Places

HEADS, KV_HEADS, DIM = 6, 2, 8


def arrays(length, dtype=jnp.float32, rows=2, dim=DIM):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((rows, length, heads, dim) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return tuple(jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))


def whole(query, key, value, **options):
    rows, length = query.shape[:2]
    places = Places(jnp.broadcast_to(jnp.arange(length), (rows, length)), jnp.ones((rows, length), jnp.int32))
    return attention(query, key, value, places, **options)


def token_by_token(query, key, value, start, room, **options):
    """The outputs of the tokens from `start` on, [rows, T - start, H, d], with a cache of one layer."""
    rows, length = query.shape[:2]
    cache = Cache.of([key[:, :start]], [value[:, :start]], jnp.full(rows, start), room)
    out = []
    for place in range(start, length):
        cache = cache.put(0, key[:, place], value[:, place])
        out.append(cache.attend(0, query[:, place], **options))
        cache = cache._replace(lengths=cache.lengths + 1)
    return jnp.stack(out, axis=1)


def as_run(row, start, room):
    """The outputs of the tokens from `start` on, of the whole row and token by token, compiled as in a run."""
    full = jax.jit(lambda row: whole(*row, scale=0.3)[:, start:], compiler_options=as_written())(row)
    each = jax.jit(lambda row: token_by_token(*row, start, room, scale=0.3), compiler_options=as_written())(row)
    return np.asarray(full), np.asarray(each)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 0.7)])
def test_every_token_is_as_in_the_whole_row(window, softcap, platform, monkeypatch):
    length, start = BLOCK + 9, BLOCK - 2
    row = arrays(length)
    traced = None if window is None else jnp.asarray(window)
    full = whole(*row, scale=0.3, window=traced, softcap=softcap)[:, start:]
    monkeypatch.setattr("jaxpost.models.cache.platform", lambda: platform)
    each = token_by_token(*row, start, length + 5, scale=0.3, window=window, softcap=softcap)
    np.testing.assert_allclose(each, full, atol=1e-6)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 0.7)])
def test_rows_of_different_lengths_see_their_own_tokens_only(window, softcap):
    query, key, value = arrays(9)
    lengths = jnp.asarray([8, 3])
    rows = jnp.arange(2)
    traced = None if window is None else jnp.asarray(window)
    full = whole(query, key, value, scale=0.3, window=traced, softcap=softcap)[rows, lengths]
    cache = Cache.of([key], [value], lengths, 20).put(0, key[rows, lengths], value[rows, lengths])
    one = cache.attend(0, query[rows, lengths], scale=0.3, window=window, softcap=softcap)
    np.testing.assert_allclose(one, full, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_growing_changes_nothing_but_the_room(dtype, platform, monkeypatch):
    monkeypatch.setattr("jaxpost.models.cache.platform", lambda: platform)
    query, key, value = arrays(10, dtype)
    small = Cache.of([key], [value], jnp.full(2, 9), 10)
    large = small.grown(3 * BLOCK + 1)
    assert (small.room, large.room) == (10, 3 * BLOCK + 1)
    outs = (cache.put(0, key[:, 9], value[:, 9]).attend(0, query[:, 9], scale=0.3) for cache in (small, large))
    small_out, large_out = outs
    assert small_out.dtype == dtype
    np.testing.assert_allclose(small_out.astype(jnp.float32), large_out.astype(jnp.float32), atol=1e-6)


@pytest.mark.slow  # holds on processors that multiply bfloat16 natively, in pairs
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_on_cpu_a_token_is_the_same_to_the_bit(dtype):
    np.testing.assert_array_equal(*as_run(arrays(150, dtype, rows=24, dim=64), 120, 192))


def test_bfloat16_is_rounded_where_the_attention_of_rows_rounds_it():
    full, each = as_run(arrays(40, jnp.bfloat16), 8, 40)
    # Sums in float32 may differ in their last places, and seldom enough to be rounded to the next number.
    assert np.mean(full != each) < 0.01
