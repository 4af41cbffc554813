import numpy as np
import pytest

from jaxpost.data.examples import Example
from jaxpost.data.packing import PackingConfig, first_tokens, pack, pack_examples, singles, units
from jaxpost.data.store import stored
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
    rows = pack(LENGTHS, 1024)
    assert np.minimum(LENGTHS, 1024).sum() / (len(rows) * 1024) > 0.97


def test_the_fullest_row_with_room_is_taken():
    rows = pack([6, 5, 4, 3], 10)
    assert [[piece.example for piece in row] for row in rows] == [[0, 2], [1, 3]]


def test_unknown_strategy_is_named():
    with pytest.raises(ConfigError, match="did you mean 'bfd'"):
        pack([1], 4, "bdf")


def example(*tokens, trained=True):
    return Example(np.array(tokens, np.int32), np.array([False] + [trained] * (len(tokens) - 1)))


def test_a_piece_without_its_beginning_has_no_target_there():
    packs = pack_examples(stored([example(1, 2, 3, 4, 5)]), 3, "bfd_split")
    assert [[part.tokens.tolist() for part in pack] for pack in packs] == [[[1, 2, 3]], [[4, 5]]]
    assert [[part.loss_mask.tolist() for part in pack] for pack in packs] == [[[False, True, True]], [[False, True]]]
    assert packs.efficiency(3) == 5 / 6
    assert packs.sizes.tolist() == [3, 2]


def test_packs_without_a_target_are_left_out():
    packs = pack_examples(stored([example(1, 2, 3, trained=False), example(4, 5, 6)]), 3, "bfd")
    assert [[part.tokens.tolist() for part in pack] for pack in packs] == [[[4, 5, 6]]]


def test_each_example_can_be_a_pack_of_its_own():
    packs = singles(stored([example(1, 2), example(3, 4, 5)]))
    assert [[part.tokens.tolist() for part in pack] for pack in packs] == [[[1, 2]], [[3, 4, 5]]]
    assert packs.sizes.tolist() == [2, 3]


def test_a_unit_has_once_what_its_examples_begin_with_alike():
    def masked(mask, *tokens):
        return Example(np.array(tokens, np.int32), np.array(mask, bool))

    pairs = [
        (masked([0, 0, 0, 1, 1], 1, 2, 3, 4, 5), masked([0, 0, 0, 1], 1, 2, 3, 6)),
        (masked([0, 0, 1], 1, 2, 3), masked([0, 0, 0, 1], 1, 2, 3, 4)),
        (masked([0, 0, 0, 1], 1, 2, 3, 4), masked([0, 0, 0, 1], 1, 9, 3, 4)),
        (masked([0, 1], 1, 2), masked([0, 1], 1, 3)),
        (masked([0, 0, 1], 1, 2, 3), masked([0, 0, 1], 7, 2, 3)),
    ]
    packs = units(stored([example for pair in pairs for example in pair]), 2, {}, branches=True)
    branches = [(pack[1].tokens.tolist(), pack[1].loss_mask.tolist(), pack[1].start) for pack in packs]
    assert branches == [
        ([3, 6], [False, True], 2),
        ([2, 3, 4], [False, False, True], 1),
        ([1, 9, 3, 4], [False, False, False, True], 0),
        ([1, 3], [False, True], 0),
        ([7, 2, 3], [False, False, True], 0),
    ]
    assert all(pack[0].start == 0 for pack in packs)
    assert packs.sizes.tolist() == [7, 6, 8, 4, 6]


def test_packs_are_told_apart_by_their_tokens_masks_and_cuts():
    examples = [example(1, 2, 3), example(4, 5)]
    digests = {
        singles(stored(examples)).digest(),
        singles(stored(examples[::-1])).digest(),
        singles(stored([examples[0], example(4, 5, trained=False)])).digest(),
        pack_examples(stored(examples), 5, "bfd").digest(),
        pack_examples(stored(examples), 4, "wrapped").digest(),
    }
    assert len(digests) == 5


def test_first_tokens_stop_with_the_example_that_fills_them():
    asked = []

    def examples():
        for i in range(9):
            asked.append(i)
            yield example(1, 2, 3)

    assert len(list(first_tokens(examples(), 7))) == len(asked) == 3


@pytest.mark.parametrize(("held_out", "expected"), [(None, True), (False, False), (True, True)])
def test_evaluation_packs_as_training_unless_told_otherwise(held_out, expected):
    config = PackingConfig(packing=True, eval_packing=held_out)
    assert config.packs(training=True)
    assert config.packs(training=False) is expected
