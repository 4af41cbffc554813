"""Order, slices, padding and bucket lengths of the loader."""

import itertools

import numpy as np
import pytest

from jaxpost.data.examples import Example
from jaxpost.data.loader import MAX_CANDIDATES, Loader, LoaderConfig, bucket_lengths, collate
from jaxpost.data.packing import Packs, singles
from jaxpost.data.store import stored
from jaxpost.errors import ConfigError

SAMPLINGS = ("random", "sequential", "group_by_length")
# What this code gave on the day it was written: a run that is resumed later must find the same order.
ORDER_OF_SEED_42 = [
    [0, 1, 4, 2, 6, 8, 5, 9, 7, 3],
    [7, 3, 4, 2, 5, 9, 6, 8, 0, 1],
]


def make_examples(count, seed=0, longest=40):
    """Examples of random lengths whose first token is their number; the rest is above any number."""
    rng = np.random.default_rng(seed)
    examples = []
    for i, size in enumerate(rng.integers(2, longest + 1, count)):
        tokens = np.concatenate([[i], rng.integers(10_000, 20_000, size - 1)]).astype(np.int32)
        loss_mask = rng.random(size) < 0.6
        loss_mask[0], loss_mask[-1] = False, True
        examples.append(Example(tokens, loss_mask))
    return examples


def packs_of(groups):
    """Each group of examples as a pack."""
    examples = [example for group in groups for example in group]
    pieces = [(i, 0, len(example.tokens)) for i, example in enumerate(examples)]
    return Packs(stored(examples), np.array(pieces, np.int64), np.cumsum([len(group) for group in groups]))


def make_loader(examples, **changes):
    options = {
        "global_batch_size": 8,
        "num_rows": 8,
        "num_steps": 18,
        "pad_id": 3,
        "seed": 0,
        "sampling": "random",
        "num_lengths": 2,
        "multiple": 8,
    }
    return Loader(singles(stored(examples)), **{**options, **changes})


def numbers(batch):
    """Which examples are in a batch, in order."""
    begins = (batch["positions"] == 0) & (batch["segments"] > 0)
    return [int(number) for number in batch["tokens"][begins]]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("process_count", [2, 8])
@pytest.mark.parametrize("size", [8, 24])
def test_the_slices_of_all_processes_are_the_global_batch(sampling, process_count, size):
    examples = make_examples(53)
    options = {"sampling": sampling, "global_batch_size": size}
    whole = make_loader(examples, **options)
    parts = [
        make_loader(examples, **options, process_index=i, process_count=process_count) for i in range(process_count)
    ]
    for step in range(2 * whole.steps_per_epoch):
        slices = [part.batch(step) for part in parts]
        assert all(len(part["tokens"]) == 8 // process_count for part in slices)
        assert_same(whole.batch(step), {key: np.concatenate([part[key] for part in slices]) for key in slices[0]})


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1003])
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_each_example_comes_once_per_epoch(sampling, count, num_rows):
    loader = make_loader(make_examples(count), sampling=sampling, num_rows=num_rows)
    assert loader.steps_per_epoch == -(-count // 8)
    for epoch in range(2):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        seen = [number for step in steps for number in numbers(loader.batch(step))]
        assert sorted(seen) == list(range(count))
        if sampling == "sequential" and num_rows in (1, 8):
            assert seen == list(range(count))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("start", [0, 1, 6, 7, 13, 14, 19])
def test_iteration_resumes_at_any_step(sampling, start):
    examples = make_examples(53)
    loader = make_loader(examples, sampling=sampling)
    uninterrupted = list(loader(0))
    assert len(uninterrupted) == 18
    resumed = list(make_loader(examples, sampling=sampling)(start))
    assert len(resumed) == max(0, 18 - start)
    for step, batch in enumerate(resumed, start=start):
        assert_same(batch, uninterrupted[step])
        assert_same(batch, loader.batch(step))


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_the_order_changes_with_epoch_and_seed_and_with_nothing_else(sampling):
    examples = make_examples(200)
    first = make_loader(examples, sampling=sampling)
    assert (first.epoch_order(0) == make_loader(examples, sampling=sampling).epoch_order(0)).all()
    assert (first.epoch_order(0) != first.epoch_order(1)).any()
    assert (first.epoch_order(0) != make_loader(examples, sampling=sampling, seed=1).epoch_order(0)).any()
    assert (first.epoch_order(1) != make_loader(examples, sampling=sampling, seed=1).epoch_order(0)).any()


def test_the_order_of_a_seed_is_the_same_in_every_version():
    loader = make_loader(make_examples(10), seed=42)
    assert loader.epoch_order(0).tolist() == ORDER_OF_SEED_42[0]
    assert loader.epoch_order(1).tolist() == ORDER_OF_SEED_42[1]


def test_random_order_does_not_depend_on_the_batch_size():
    examples = make_examples(40)
    small, large = make_loader(examples), make_loader(examples, global_batch_size=16, num_rows=16)
    both = [
        [n for step in range(loader.steps_per_epoch) for n in numbers(loader.batch(step))] for loader in (small, large)
    ]
    assert both[0] == both[1]


def test_group_by_length_sorts_within_mega_batches():
    examples = make_examples(1000, longest=400)
    sizes = np.array([len(example.tokens) for example in examples])
    loader = make_loader(examples, sampling="group_by_length")
    order = loader.epoch_order(0)
    mega = 8 * (1000 // (4 * 8))  # four mega-batches, as the data is less than 200 batches
    assert all(sizes[loader.epoch_order(epoch)[0]] == sizes.max() for epoch in range(5))
    for start in range(0, 1000, mega):
        part = sizes[order[start : start + mega]][1:]  # the first may have been exchanged for the longest of all
        assert (np.diff(part) <= 0).all()
    spread = [np.ptp(sizes[order[i : i + 8]]) for i in range(8, 1000, 8)]
    shuffled = make_loader(examples).epoch_order(0)
    assert np.mean(spread) < 0.2 * np.mean([np.ptp(sizes[shuffled[i : i + 8]]) for i in range(8, 1000, 8)])


def test_the_last_batch_of_an_epoch_is_filled_with_empty_rows():
    loader = make_loader(make_examples(11), sampling="sequential")
    batch = loader.batch(1)
    assert numbers(batch) == [8, 9, 10]
    assert (batch["tokens"][3:] == 3).all()
    for key in ("positions", "segments", "loss_mask"):
        assert not batch[key][3:].any()


def test_a_batch_takes_the_shortest_length_that_holds_its_longest_row():
    sizes = [3, 16, 2, 2, 17, 2, 40, 2]
    examples = [Example(np.full(size, i, np.int32), np.ones(size, bool)) for i, size in enumerate(sizes)]
    options = {"global_batch_size": 2, "num_rows": 2, "sampling": "sequential", "num_steps": 4, "num_lengths": 4}
    loader = make_loader(examples, **options, multiple=1)
    assert loader.lengths == [2, 16, 17, 40]
    assert [loader.batch(step)["tokens"].shape for step in range(4)] == [(2, 16), (2, 2), (2, 17), (2, 40)]
    # a process whose own rows are short pads to the length of the others' rows
    last = make_loader(examples, **options, multiple=1, process_index=1, process_count=2)
    assert [last.batch(step)["tokens"].shape for step in range(4)] == [(1, 16), (1, 2), (1, 17), (1, 40)]
    assert [loader.padding(n) for n in (1, 4)] == pytest.approx([1 - 84 / 320, 1 - 84 / 150])
    # a batch that was not planned for gets a length of its own
    assert make_loader(examples, **{**options, "num_steps": 1}).batch(3)["tokens"].shape == (2, 40)


def test_fewer_rows_hold_several_examples_each_and_balance():
    sizes = [10, 1, 9, 2, 8, 3, 7, 4]
    examples = [Example(np.full(size, i, np.int32), np.ones(size, bool)) for i, size in enumerate(sizes)]
    loader = make_loader(examples, num_rows=4, sampling="sequential", num_lengths=1, multiple=1, num_steps=1)
    assert loader.lengths == [11]
    assert loader.layout(0) == ([[0, 1], [2, 3], [4, 5], [6, 7]], 11)
    assert loader.padding(1) == 0
    alone = make_loader(examples, sampling="sequential", num_lengths=1, multiple=1, num_steps=1)
    assert alone.layout(0) == ([[i] for i in range(8)], 10)
    assert alone.padding(1) == pytest.approx(1 - 44 / 80)


def test_collate():
    examples = [
        Example(np.array([5, 6, 7], np.int32), np.array([False, True, False])),
        Example(np.array([8, 9], np.int32), np.array([False, True]), start=2),
    ]
    batch = collate([examples, examples[1:], []], length=6, pad_id=1)
    assert batch["tokens"].tolist() == [[5, 6, 7, 8, 9, 1], [8, 9, 1, 1, 1, 1], [1] * 6]
    assert batch["positions"].tolist() == [[0, 1, 2, 2, 3, 0], [2, 3, 0, 0, 0, 0], [0] * 6]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0], [0] * 6]
    assert batch["loss_mask"].tolist() == [[0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6]
    assert {key: value.dtype.name for key, value in batch.items()} == {
        "tokens": "int32",
        "positions": "int32",
        "segments": "int32",
        "loss_mask": "float32",
    }


def padded_tokens(lengths, buckets):
    return sum(min(bucket for bucket in buckets if bucket >= length) for length in lengths)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_buckets", [1, 2, 3, 5])
def test_buckets_pad_the_least(seed, num_buckets):
    rng = np.random.default_rng(seed)
    multiple = int(rng.choice([1, 4, 8]))
    lengths = np.minimum(1 + rng.exponential(12, 30), 32).astype(int).tolist()
    buckets = bucket_lengths(lengths, num_buckets, multiple)
    longest = -(-max(lengths) // multiple) * multiple
    assert buckets == sorted(set(buckets)) and buckets[-1] == longest and len(buckets) <= num_buckets
    assert all(bucket % multiple == 0 for bucket in buckets)
    choices = itertools.combinations(range(multiple, longest, multiple), num_buckets - 1)
    best = min((padded_tokens(lengths, [*choice, longest]) for choice in choices), default=longest * len(lengths))
    assert padded_tokens(lengths, buckets) <= best


def test_bucket_limits():
    assert bucket_lengths([5, 700], 1, 128) == [768]
    assert bucket_lengths([5, 5, 6], 9, 8) == [8]
    assert bucket_lengths([5, 12, 30], 9, 8) == [8, 16, 32]
    many = bucket_lengths(range(1, 4 * MAX_CANDIDATES), 4, 1)
    quarters = [MAX_CANDIDATES * i for i in (1, 2, 3, 4)]
    np.testing.assert_allclose(many, quarters, rtol=0.01)


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="a batch of 8 rows cannot be divided among 3 processes"):
        make_loader(make_examples(4), process_count=3)
    with pytest.raises(ConfigError, match=r"train_sampling_strategy is 'randon' \(did you mean 'random'\?\)"):
        make_loader(make_examples(4), sampling="randon")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it must be at least 1"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps is -1"),
        ({"length_buckets": 0}, "length_buckets is 0"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
        ({"data_seed": -1}, "data_seed is -1; it must be at least 0"),
        ({"train_sampling_strategy": "grouped"}, "train_sampling_strategy is 'grouped'"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        LoaderConfig(**options)


def test_packs_stay_together_and_their_examples_apart():
    packs = [make_examples(3), make_examples(2, seed=1), make_examples(1, seed=2)]
    options = {"global_batch_size": 3, "num_rows": 3, "num_steps": 1, "pad_id": 0, "seed": 0, "sampling": "sequential"}
    batch = Loader(packs_of(packs), **options, num_lengths=1, multiple=1).batch(0)
    assert batch["segments"].max(axis=1).tolist() == [3, 2, 1]
    assert batch["tokens"][0][batch["segments"][0] == 2].tolist() == packs[0][1].tokens.tolist()
    assert np.all(batch["positions"][0][batch["segments"][0] == 3] == np.arange(len(packs[0][2].tokens)))


def test_fingerprint_tells_other_batches_apart_but_not_other_processes():
    examples = make_examples(20)
    one = make_loader(examples).fingerprint()
    assert one == make_loader(make_examples(20), process_count=2, num_rows=4, num_lengths=1).fingerprint()
    other_mask = [*examples[:-1], Example(examples[-1].tokens, ~examples[-1].loss_mask)]
    others = [
        make_loader(examples[::-1]),
        make_loader(other_mask),
        make_loader(examples, seed=1),
        make_loader(examples, global_batch_size=16),
        make_loader(examples, sampling="sequential"),
        Loader(
            packs_of([examples]),
            global_batch_size=8,
            num_rows=8,
            num_steps=1,
            pad_id=3,
            seed=0,
            sampling="random",
            num_lengths=2,
            multiple=8,
        ),
    ]
    assert len({one, *(loader.fingerprint() for loader in others)}) == 7
