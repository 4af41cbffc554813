import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.models.config import Rotary
from jaxpost.models.rotary import apply_rotary, rotary_angles, text_lengths

LONGROPE = Rotary(dim=4, kind="longrope", original_max_positions=8, short_factors=(1.0, 2.0), long_factors=(4.0, 8.0))


def angles(rotary, positions, lengths=0):
    table = rotary_angles([rotary], jnp.asarray(positions), jnp.broadcast_to(lengths, (len(positions),)))
    return np.arctan2(table.sin[0], table.cos[0])


def test_length_of_each_tokens_document():
    positions = jnp.asarray([[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [1] * 8])
    lengths = text_lengths(positions, segments)
    assert lengths[0, :6].tolist() == [3, 3, 3, 2, 2, 1]
    assert lengths[1].tolist() == [8] * 8


def test_longrope_takes_its_divisors_by_the_documents_length():
    base = angles(Rotary(dim=4), [1, 1])
    np.testing.assert_allclose(angles(LONGROPE, [1, 1], jnp.asarray([8, 9])), base / [[1, 2], [4, 8]], rtol=1e-5)


def test_dynamic_is_default_up_to_the_trained_length_and_slower_beyond():
    dynamic = Rotary(dim=8, kind="dynamic", factor=2.0, original_max_positions=16)
    base = angles(Rotary(dim=8), [1, 1])
    now = angles(dynamic, [1, 1], jnp.asarray([16, 17]))
    np.testing.assert_allclose(now[0], base[0], rtol=1e-5)
    assert np.all(now[1, 1:] < base[1, 1:])


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_scaled_kinds_keep_fast_pairs_and_divide_slow_ones(kind):
    rotary = Rotary(dim=64, kind=kind, factor=8.0, original_max_positions=4096)
    ratio = angles(Rotary(dim=64), [1])[0] / angles(rotary, [1])[0]
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(8.0, rel=1e-3)
    assert np.all(np.diff(ratio) > -1e-3)


def test_no_position_and_partial_rotation_leave_what_they_do_not_turn():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 6)).astype(np.float32))
    for rotary, turned in ((Rotary(dim=6, kind="none"), 0), (Rotary(dim=4), 4)):
        table = rotary_angles([rotary], jnp.arange(3) + 1, 0)
        out = apply_rotary(x, table.cos[0], table.sin[0])
        np.testing.assert_array_equal(out[..., turned:], x[..., turned:])
        assert turned == 0 or not np.any(np.isclose(out[..., :turned], x[..., :turned]))
    np.testing.assert_allclose(jnp.linalg.norm(out, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
