"""Examples on disk: what comes back, what a cache may and may not give, killed and concurrent writers."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from jaxpost.data.examples import Example
from jaxpost.data.store import ABANDONED_SECONDS, BATCH, KEPT_SECONDS, SUFFIX, UNFINISHED, stored
from jaxpost.errors import CheckpointError


def make_examples(count=BATCH + 7, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 30, count)
    return [Example(rng.integers(0, 2**31 - 1, n).astype(np.int32), rng.random(n) < 0.5) for n in sizes]


def assert_holds(store, examples):
    assert len(store) == len(examples)
    assert store.lengths.tolist() == [len(example.tokens) for example in examples]
    for mine, theirs in zip(store, examples, strict=True):
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        np.testing.assert_array_equal(mine.loss_mask, theirs.loss_mask)
        assert mine.tokens.dtype == np.int32 and mine.loss_mask.dtype == bool


def never():
    raise AssertionError("the rows were tokenised again")
    yield


@pytest.mark.parametrize("count", [0, 1, BATCH, 2 * BATCH + 1])
def test_what_was_stored_comes_back(count, tmp_path):
    examples = make_examples(count)
    assert_holds(stored(examples), examples)
    assert_holds(stored(examples, folder=str(tmp_path), key="a"), examples)
    again = stored(never(), folder=str(tmp_path), key="a")
    assert_holds(again, examples)
    with pytest.raises(IndexError):
        again[count]


def test_facts_are_noted_after_the_last_example(tmp_path):
    seen = []

    def examples():
        for example in make_examples(3):
            seen.append(1)
            yield example

    stored(examples(), lambda: {"seen": len(seen)}, folder=str(tmp_path), key="a")
    assert stored(never(), folder=str(tmp_path), key="a").facts == {"seen": 3}


def test_the_digest_is_of_tokens_masks_and_lengths():
    one, two = (
        Example(np.arange(4, dtype=np.int32), np.ones(4, bool)),
        Example(np.arange(2, dtype=np.int32), np.ones(2, bool)),
    )
    assert stored([one, two]).digest == stored([one, two]).digest
    others = [[two, one], [one], [one._replace(loss_mask=np.zeros(4, bool)), two], [two, two, two]]
    assert len({stored(examples).digest for examples in [[one, two], *others]}) == 5


def test_without_a_key_nothing_is_left(tmp_path):
    store = stored(make_examples(5), folder=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert_holds(store, make_examples(5))


def test_another_key_is_another_entry(tmp_path):
    stored(make_examples(5), folder=str(tmp_path), key="a")
    assert_holds(stored(make_examples(4, seed=1), folder=str(tmp_path), key="b"), make_examples(4, seed=1))


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_entry_is_made_anew(seed, tmp_path, caplog):
    examples = make_examples(50)
    stored(examples, folder=str(tmp_path), key="a")
    entry = tmp_path / f"a{SUFFIX}"
    data, rng = bytearray(entry.read_bytes()), np.random.default_rng(seed)
    if seed % 4 == 0:
        data = data[: rng.integers(len(data))]
    else:
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    entry.write_bytes(data)
    assert_holds(stored(examples, folder=str(tmp_path), key="a"), examples)  # a flip in padding may go unseen
    assert_holds(stored(never(), folder=str(tmp_path), key="a"), examples)


def test_a_failure_leaves_no_entry(tmp_path):
    def failing():
        yield from make_examples(3)
        raise RuntimeError("no more rows")

    with pytest.raises(RuntimeError, match="no more rows"):
        stored(failing(), folder=str(tmp_path), key="a")
    assert list(tmp_path.iterdir()) == []


def write_slowly(folder, started):
    def examples():
        yield from make_examples(2 * BATCH)
        started.set()
        time.sleep(60)

    stored(examples(), folder=folder, key="a")


def test_a_killed_writer_leaves_no_entry_and_what_it_wrote_is_removed_in_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    writer = context.Process(target=write_slowly, args=(str(tmp_path), started))
    writer.start()
    assert started.wait(30)
    [unfinished] = tmp_path.iterdir()
    os.utime(unfinished, (0, time.time() - 2 * ABANDONED_SECONDS))
    stored(make_examples(3), folder=str(tmp_path), key="b")
    assert unfinished.exists()  # its writer is alive, only slow
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert_holds(stored(make_examples(4), folder=str(tmp_path), key="a"), make_examples(4))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [SUFFIX, SUFFIX]


def test_of_two_writers_either_may_win(tmp_path):
    examples = make_examples()

    def interrupted():
        yield from examples[:5]
        assert_holds(stored(examples, folder=str(tmp_path), key="a"), examples)
        yield from examples[5:]

    assert_holds(stored(interrupted(), folder=str(tmp_path), key="a"), examples)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{SUFFIX}"]


def test_entries_that_nobody_uses_go_and_others_files_stay(tmp_path):
    stored(make_examples(3), folder=str(tmp_path), key="old")
    stored(make_examples(3), folder=str(tmp_path), key="used")
    for path in tmp_path.iterdir():
        os.utime(path, (0, time.time() - 2 * KEPT_SECONDS))
    (tmp_path / "notes.txt").write_text("mine")
    os.utime(tmp_path / "notes.txt", (0, 0))
    stored(never(), folder=str(tmp_path), key="used")
    stored(make_examples(3), folder=str(tmp_path), key="new")
    assert {path.name for path in tmp_path.iterdir()} == {f"used{SUFFIX}", f"new{SUFFIX}", "notes.txt"}
    assert not any(path.suffix == UNFINISHED for path in tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: tokenised rows cannot be written .* --tokenized_cache_dir"):
        stored(make_examples(3), folder=str(tmp_path / "file"), key="a")
