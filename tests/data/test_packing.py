import numpy as np
import pytest

from jaxpost.data.chat import Example
from jaxpost.data.packing import PackingConfig, Piece, efficiency, pack, pack_examples
from jaxpost.errors import ConfigError

LENGTHS = np.random.default_rng(0).lognormal(4.5, 0.8, 500).astype(int)


def tokens(rows, examples):
    return [[examples[piece.example][piece.start : piece.stop] for piece in row] for row in rows]


@pytest.mark.parametrize(
    ("examples", "capacity", "strategy", "expected"),
    [
        ([[1, 2, 3], [4, 5, 6, 7], [8]], 4, "bfd", [[[4, 5, 6, 7]], [[1, 2, 3], [8]]]),
        ([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11], [12]], 4, "bfd", [[[1, 2, 3, 4]], [[8, 9, 10, 11]], [[6, 7], [12]]]),
        (
            [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11], [12]],
            4,
            "bfd_split",
            [[[1, 2, 3, 4]], [[8, 9, 10, 11]], [[6, 7], [5], [12]]],
        ),
        ([[1, 2, 3], [4, 5, 6, 7], [8]], 3, "wrapped", [[[1, 2, 3]], [[4, 5, 6]], [[7], [8]]]),
        ([[1, 2], [], [3]], 5, "bfd", [[[1, 2], [3]]]),
        ([[], []], 5, "wrapped", []),
    ],
)
def test_rows_that_can_be_checked_by_hand(examples, capacity, strategy, expected):
    assert tokens(pack([len(example) for example in examples], capacity, strategy), examples) == expected


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("capacity", [37, 256, 1000])
def test_every_token_is_in_one_row_and_no_row_is_too_long(strategy, capacity):
    rows = pack(LENGTHS, capacity, strategy)
    assert max(sum(piece.stop - piece.start for piece in row) for row in rows) <= capacity
    covered = [np.zeros(length, int) for length in LENGTHS]
    for row in rows:
        for piece in row:
            covered[piece.example][piece.start : piece.stop] += 1
    for example, length in zip(covered, LENGTHS, strict=True):
        kept = min(length, capacity) if strategy == "bfd" else length
        assert np.all(example[:kept] == 1)
        assert not np.any(example[kept:])


def test_rows_are_nearly_full():
    assert efficiency(pack(LENGTHS, 1024), 1024) > 0.97
    assert efficiency([[Piece(0, 0, 3)], [Piece(1, 0, 2)]], 5) == 0.5


def test_the_fullest_row_with_room_is_taken():
    rows = pack([6, 5, 4, 3], 10)
    assert [[piece.example for piece in row] for row in rows] == [[0, 2], [1, 3]]


def test_unknown_strategy_is_named():
    with pytest.raises(ConfigError, match="did you mean 'bfd'"):
        pack([1], 4, "bdf")


def example(*tokens, trained=True):
    return Example(np.array(tokens, np.int32), np.array([False] + [trained] * (len(tokens) - 1)))


def test_a_piece_without_its_beginning_has_no_target_there():
    packs, full = pack_examples([example(1, 2, 3, 4, 5)], 3, "bfd_split")
    assert [[part.tokens.tolist() for part in pack] for pack in packs] == [[[1, 2, 3]], [[4, 5]]]
    assert [[part.loss_mask.tolist() for part in pack] for pack in packs] == [[[False, True, True]], [[False, True]]]
    assert full == 5 / 6


def test_packs_without_a_target_are_left_out():
    packs, _ = pack_examples([example(1, 2, 3, trained=False), example(4, 5, 6)], 3, "bfd")
    assert [[part.tokens.tolist() for part in pack] for pack in packs] == [[[4, 5, 6]]]


def test_packing_needs_a_length():
    with pytest.raises(ConfigError, match="give --max_length"):
        pack_examples([example(1, 2)], None, "bfd")


@pytest.mark.parametrize(("held_out", "expected"), [(None, True), (False, False), (True, True)])
def test_evaluation_packs_as_training_unless_told_otherwise(held_out, expected):
    config = PackingConfig(packing=True, eval_packing=held_out)
    assert config.packs(training=True)
    assert config.packs(training=False) is expected
