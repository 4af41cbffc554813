"""The stream of tokens that a run sees: one, whatever the number of processes and wherever it stops and goes on."""

import numpy as np
import pytest

from jaxpost.data.loader import Loader
from tests.data.test_loader import SAMPLINGS, assert_same, make_examples, packs_of

COUNT, SIZE = 53, 8  # packs, and those of a batch: the last batch of an epoch is smaller
STEPS_PER_EPOCH = -(-COUNT // SIZE)
# One example a pack and a pack a row, as without packing; two packs a row, as where a device's examples share one; and
# packs of one to three examples, as with packing.
LAYOUTS = ("alone", "shared", "packed")


def make_packs(layout):
    if layout != "packed":
        return [[example] for example in make_examples(COUNT)]
    examples = iter(make_examples(3 * COUNT))
    return [[next(examples) for _ in range(1 + number % 3)] for number in range(COUNT)]


def make_loader(layout, sampling, epochs=2, **changes):
    return Loader(
        packs_of(make_packs(layout)),
        global_batch_size=2 * SIZE if layout == "shared" else SIZE,
        num_rows=SIZE,
        num_steps=epochs * STEPS_PER_EPOCH,
        pad_id=3,
        seed=5,
        sampling=sampling,
        num_lengths=3,
        multiple=8,
        **changes,
    )


def documents(batch):
    """(tokens, loss mask) of each document of a batch, row by row."""
    for row in range(len(batch["tokens"])):
        for number in range(1, batch["segments"][row].max() + 1):
            ours = batch["segments"][row] == number
            yield batch["tokens"][row, ours].tolist(), batch["loss_mask"][row, ours].tolist()


def joined(slices):
    """The global batch, of the slices of all processes."""
    assert len({part["tokens"].shape for part in slices}) == 1
    return {name: np.concatenate([part[name] for part in slices]) for name in slices[0]}


def stream(layout, sampling, process_count, start=0):
    """The global batches from number `start` on, put together of what each process iterates over."""
    processes = [
        make_loader(layout, sampling, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    slices = [list(process(start)) for process in processes]
    assert {len(batches) for batches in slices} == {max(0, 2 * STEPS_PER_EPOCH - start)}
    return [joined(parts) for parts in zip(*slices, strict=True)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_numbers_of_processes_see_one_stream(layout, sampling):
    whole = stream(layout, sampling, process_count=1)
    for process_count in (2, 8):
        for one, other in zip(whole, stream(layout, sampling, process_count), strict=True):
            assert_same(one, other)
    # Every epoch holds every document once, with all of its tokens and its mask.
    expected = sorted(
        (example.tokens.tolist(), example.loss_mask.tolist()) for p in make_packs(layout) for example in p
    )
    per_epoch = make_loader(layout, sampling).steps_per_epoch
    for epoch in range(2 * STEPS_PER_EPOCH // per_epoch):
        batches = whole[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(document for batch in batches for document in documents(batch)) == expected


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "process_counts", [(1, 1), (2, 2), (8, 1), (1, 8)], ids=lambda counts: "{} to {}".format(*counts)
)
def test_a_run_that_stops_anywhere_goes_on_with_the_same_stream(layout, sampling, process_counts):
    before, after = process_counts
    whole = stream(layout, sampling, before)
    for start in range(2 * STEPS_PER_EPOCH + 1):
        for one, other in zip(whole[start:], stream(layout, sampling, after, start), strict=True):
            assert_same(one, other)


def test_a_longer_run_begins_with_the_stream_of_a_shorter_one():
    """More epochs may choose other row lengths, but not other documents, nor another order."""
    short, long = (make_loader("packed", "random", epochs) for epochs in (1, 3))
    for step in range(STEPS_PER_EPOCH):
        assert list(documents(short.batch(step))) == list(documents(long.batch(step)))
