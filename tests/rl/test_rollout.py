"""The arithmetic of generations, and how completions are dealt to rows."""

import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.rl.plan import Plan, RolloutConfig, plan
from jaxpost.rl.rows import deal


@pytest.mark.parametrize(
    ("flags", "row_size", "groups", "accumulation", "expected"),
    [
        ({}, 8, 1, 1, Plan(1, 8, 8, 1, 1, 1, 1)),
        ({}, 16, 4, 2, Plan(16, 8, 16, 8, 1, 1, 2)),
        ({"num_iterations": 3, "steps_per_generation": 4}, 4, 1, 2, Plan(2, 8, 4, 2, 2, 3, 2)),
        ({"generation_batch_size": 64, "num_generations": 4}, 8, 2, 1, Plan(16, 4, 8, 2, 4, 1, 1)),
    ],
)
def test_the_numbers_of_a_run(flags, row_size, groups, accumulation, expected):
    found = plan(RolloutConfig(**flags), row_size, groups, accumulation)
    assert found == expected
    assert found.num_completions == found.row_size * found.num_rows * found.num_parts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_generations": 1}, "num_generations is 1; it must be at least 2"),
        ({"steps_per_generation": 3}, "a generation fills 3 micro-batches; that must be a multiple of"),
        ({"generation_batch_size": 12}, "generation_batch_size is 12; it must be a multiple of the 8 completions"),
        ({"num_generations": 3}, "a generation has 16 completions; that must be a multiple of num_generations, 3"),
        ({"generation_batch_size": 16, "steps_per_generation": 2}, "say the same; give one of them"),
        ({"num_generations_eval": 0}, "num_generations_eval is 0"),
    ],
)
def test_numbers_that_do_not_divide_are_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        plan(RolloutConfig(**flags), 8, 1, 2)


@pytest.mark.parametrize(("row_size", "num_generations"), [(8, 8), (16, 4), (4, 8), (6, 4)])
def test_rows_have_as_many_completions_and_about_as_many_tokens(row_size, num_generations):
    count = 96
    lengths = np.random.default_rng(0).integers(5, 200, count)
    rows = deal(lengths.tolist(), Plan(count // num_generations, num_generations, row_size, count // row_size, 1, 1, 1))
    assert sorted(i for row in rows for i in row) == list(range(count))
    assert {len(row) for row in rows} == {row_size}
    totals = [lengths[row].sum() for row in rows]
    in_order = lengths.reshape(-1, row_size).sum(axis=1)
    assert np.ptp(totals) <= np.ptp(in_order)
    together = min(row_size, num_generations, int(np.gcd(row_size, num_generations)))
    assert together == row_size or np.ptp(totals) < np.ptp(in_order) / 2
    for row in rows:
        blocks = np.array(row).reshape(-1, together)
        assert np.all(blocks // num_generations == blocks[:, :1] // num_generations)
