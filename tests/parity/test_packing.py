"""Packing against TRL, which packs blocks of rows: one block, so that both see the same examples."""

import numpy as np
import pytest

from jaxpost.data.packing import STRATEGIES, pack

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("capacity", [64, 100, 333])
def test_same_rows_as_trl(strategy, capacity):
    from trl import pack_dataset

    lengths = np.random.default_rng(capacity).integers(0, 250, 400)
    ends = np.cumsum(lengths)
    examples = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    theirs = pack_dataset(datasets.Dataset.from_dict({"input_ids": examples}), capacity, strategy)["input_ids"]
    mine = [
        [token for piece in row for token in examples[piece.example][piece.start : piece.stop]]
        for row in pack(lengths, capacity, strategy)
    ]
    assert mine == list(theirs)
