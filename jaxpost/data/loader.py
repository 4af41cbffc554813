"""Packs of examples to padded batches: a global order that the seed alone decides, one slice for each process."""

import functools
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpost.data.examples import Example
from jaxpost.data.fingerprint import digest
from jaxpost.data.packing import Packs
from jaxpost.errors import ConfigError
from jaxpost.options import Group, check_choices, one_of, option

SAMPLING = ("random", "sequential", "group_by_length")
MEGA_BATCHES = 50  # batches that group_by_length sorts together, as in transformers
MAX_CANDIDATES = 1024  # lengths among which the buckets are chosen
MAX_PLANNED = 1_000_000  # examples whose batches are laid out in advance to choose them
PREFETCH_THREADS = 2
PREFETCH_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How examples become batches; the names and defaults of transformers and TRL where they have them."""

    help_group = Group.BATCH

    per_device_train_batch_size: int = option(
        8, "Rows per data-parallel group in one micro-batch of training.", may_change=True
    )
    per_device_eval_batch_size: int = option(
        8, "Rows per data-parallel group in one batch of evaluation.", may_change=True
    )
    gradient_accumulation_steps: int = option(
        1, "Micro-batches whose gradients one optimizer step adds up.", may_change=True
    )
    train_sampling_strategy: str = option(
        "random", "Order of the training rows: random, sequential, group_by_length.", choices=SAMPLING
    )
    pad_to_multiple_of: int | None = option(None, "Round padded lengths up to this; null: 8 on CPU, 128 elsewhere.")
    padding_free: bool = option(
        True, "Put a device's examples one after the other in one row, instead of padding each."
    )
    length_buckets: int = option(1, "Number of row lengths to compile; more of them waste fewer tokens on padding.")
    data_seed: int | None = option(None, "Seed of the order of the rows; null: seed.")

    def __post_init__(self) -> None:
        check_choices(self)
        for name, value, least in (
            ("per_device_train_batch_size", self.per_device_train_batch_size, 1),
            ("per_device_eval_batch_size", self.per_device_eval_batch_size, 1),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps, 1),
            ("pad_to_multiple_of", self.pad_to_multiple_of, 1),
            ("length_buckets", self.length_buckets, 1),
            ("data_seed", self.data_seed, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")


class Loader:
    """Batches of packs in an order that depends on the seed and the epoch only, not on the number of processes.

    A pack is one example, or several that stay together. Every epoch has each pack once, in a fresh order; its last
    batch is smaller. The packs of a batch are spread over `num_rows` rows, so that the longest row is short; with as
    many rows as packs each has its own. All batches have `num_rows` rows of one of few lengths, and all processes the
    same.

    Args:
        packs: what to load.
        global_batch_size: packs of one batch over all processes.
        num_rows: rows of one batch; `process_count` must divide them.
        num_steps: batches that the run will take; the row lengths suit them.
        pad_id: token id in the padding.
        seed: not negative.
        sampling: random, sequential or group_by_length.
        num_lengths: at most this many row lengths.
        multiple: every row length is a multiple of this.
        mismatch: tokens that a prompt with the completion of another example may have; None for batches without such
            examples. Which example that is does not depend on the batch; see `Packs.partner`.

    Attributes:
        packs: those that were given; `tell` adds to their facts.
        mismatch: as given.
        steps_per_epoch: batches in an epoch.
        lengths: row lengths in tokens, ascending.

    Raises:
        ConfigError: the rows cannot be divided among the processes, or there is no such sampling.
    """

    def __init__(
        self,
        packs: Packs,
        *,
        global_batch_size: int,
        num_rows: int,
        num_steps: int,
        pad_id: int,
        seed: int,
        sampling: str,
        num_lengths: int,
        multiple: int,
        mismatch: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        one_of("train_sampling_strategy", sampling, SAMPLING)
        if num_rows % process_count:
            raise ConfigError(
                f"a batch of {num_rows} rows cannot be divided among {process_count} processes; change "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        self._sizes = packs.sizes
        self.packs, self._global_batch_size, self._num_rows = packs, global_batch_size, num_rows
        self._pad_id, self._seed, self._sampling, self._multiple = pad_id, seed, sampling, multiple
        self.mismatch = mismatch
        self._process_index, self._process_count = process_index, process_count
        self._cached_order = functools.lru_cache(maxsize=2)(self.epoch_order)
        self.num_steps, self.steps_per_epoch = num_steps, math.ceil(len(packs) / global_batch_size)
        num_planned = min(num_steps, max(1, MAX_PLANNED // global_batch_size))
        self._longest, self._widest, self._longest_mismatch = [], 0, 0
        for step in range(num_planned):
            rows, longest = self.layout(step)
            self._longest.append(longest)
            if packs.facts is not None:
                self._widest = max(self._widest, *map(len, self._members(rows)))
            if mismatch is not None:
                sizes = (sum(packs.mismatched_size(i, mismatch) for i in row) for row in rows)
                self._longest_mismatch = max(self._longest_mismatch, *sizes)
        self.lengths = bucket_lengths(self._longest, num_lengths, multiple)

    def padding(self, num_lengths: int) -> float:
        """Share of the planned batches' tokens that is padding, if that many row lengths are compiled."""
        lengths = np.array(bucket_lengths(self._longest, num_lengths, self._multiple))
        padded = self._num_rows * lengths[np.searchsorted(lengths, self._longest)].sum()
        return 1 - sum(int(self._sizes[self._indices(step)].sum()) for step in range(len(self._longest))) / int(padded)

    def tell(self, name: str, values: np.ndarray) -> None:
        """Let batches tell this, too, of every example; float32 [len(packs.examples)]."""
        assert self.packs.facts is not None
        self.packs.facts = {**self.packs.facts, name: values}

    def members(self, step: int) -> list[list[int]]:
        """Numbers of the examples in each row of global batch number `step`, in the order of their segments."""
        return self._members(self.layout(step)[0])

    def fingerprint(self) -> str:
        """What the batches depend on, in 32 hexadecimal digits: every token and mask, the seed, and how they are dealt.

        The number of processes, rows and row lengths is not in it: none of them changes which packs a batch holds.
        """
        return digest(self.packs.digest(), self._seed, self._sampling, self._global_batch_size)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Indices of the packs, int64 [N], in the order of this epoch."""
        count, size = len(self.packs), self._global_batch_size
        if self._sampling == "sequential":
            return np.arange(count)
        order = shuffled(count, self._seed, epoch)
        if self._sampling == "random":
            return order
        mega = size * min(max(count // (4 * size), 1), MEGA_BATCHES)
        starts = range(0, count, mega)
        parts = [order[i : i + mega] for i in starts]
        order = np.concatenate([part[np.argsort(-self._sizes[part], kind="stable")] for part in parts])
        # The longest row of all goes first, so that a batch that does not fit in memory fails in the first step.
        longest = max(starts, key=lambda i: self._sizes[order[i]])
        order[[0, longest]] = order[[longest, 0]]
        return order

    def layout(self, step: int) -> tuple[list[list[int]], int]:
        """Which packs stand in each row of global batch number `step`, and the tokens of the longest row.

        Longest first, each to the row that is shortest so far (Graham, 1969, "Bounds on Multiprocessing Timing
        Anomalies"); the order of the rows is that of their first examples.
        """
        indices = self._indices(step)
        rows = [(0, row, []) for row in range(self._num_rows)]
        for place in np.argsort(-self._sizes[indices], kind="stable"):
            total, row, places = heapq.heappop(rows)
            places.append(int(place))
            heapq.heappush(rows, (total + int(self._sizes[indices[place]]), row, places))
        ordered = sorted((sorted(places) for _, _, places in rows), key=lambda places: places or [len(indices)])
        return [[int(indices[place]) for place in places] for places in ordered], max(total for total, _, _ in rows)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of global batch number `step`, from 0 and across epochs.

        Returns:
            The arrays of `collate` and, where the packs have facts, those of `_facts`; with mismatches also those of
            `collate` by names that begin with `mismatched_`.
        """
        rows, longest = self.layout(step)
        share = self._num_rows // self._process_count
        mine = rows[self._process_index * share : (self._process_index + 1) * share]
        examples = [[example for i in row for example in self.packs[i]] for row in mine]
        batch = collate(examples, self._padded(longest), self._pad_id) | self._facts(mine)
        if self.mismatch is None:
            return batch
        others = [[self.packs.mismatched(i, self.mismatch) for i in row] for row in mine]
        return batch | self._mismatches(others)

    def empty(self, length: int) -> dict[str, np.ndarray]:
        """This process's rows of a batch of that row length with nothing in it, to compile for."""
        rows = [[] for _ in range(self._num_rows // self._process_count)]
        batch = collate(rows, length, self._pad_id) | self._facts(rows)
        return batch if self.mismatch is None else batch | self._mismatches(rows)

    def _facts(self, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """`examples` [B, S], 1 for each example of a row in the order of its segments, and a column for each fact."""
        if self.packs.facts is None:
            return {}
        members = self._members(rows)
        width = max(self._widest, *map(len, members))
        columns = {"examples": np.ones(len(self.packs.examples), np.float32), **self.packs.facts}
        result = {name: np.zeros((len(rows), width), np.float32) for name in columns}
        for row, numbers in enumerate(members):
            for name, values in columns.items():
                result[name][row, : len(numbers)] = values[numbers]
        return result

    def _members(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Numbers of the examples in each row of packs."""
        return [[number for i in row for number in self.packs.members(i)] for row in rows]

    def _mismatches(self, rows: Sequence[Sequence[Example]]) -> dict[str, np.ndarray]:
        longest = max(self._longest_mismatch, *(sum(len(example.tokens) for example in row) for row in rows))
        columns = collate(rows, -(-longest // self._multiple) * self._multiple, self._pad_id)
        return {f"mismatched_{name}": column for name, column in columns.items()}

    def __call__(
        self, start_step: int, place: Callable[[dict[str, np.ndarray]], Any] = lambda batch: batch
    ) -> Iterator[Any]:
        """Iterate over the batches from number `start_step` on, made ahead of their use in background threads.

        `place` is the last thing that is done to each there: putting it on the devices.
        """
        import grain

        options = grain.ReadOptions(num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
        steps = grain.MapDataset.range(start_step, max(start_step, self.num_steps))
        return iter(steps.map(self.batch).map(place).to_iter_dataset(options))

    def _indices(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._cached_order(epoch)[index * self._global_batch_size : (index + 1) * self._global_batch_size]

    def _padded(self, longest: int) -> int:
        """The row length for a batch; beyond the planned ones, the next multiple."""
        fitting = (length for length in self.lengths if length >= longest)
        return next(fitting, -(-longest // self._multiple) * self._multiple)


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers from 0 to before `count` in the random order of an epoch, int64.

    Raw bits and a stable sort, because numpy keeps the bit streams between versions, but not `permutation`.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(bits, kind="stable")


def collate(rows: Sequence[Sequence[Example]], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Put examples one after the other into rows, padded on the right: [B, T] = [len(rows), length].

    Returns:
        tokens int32; positions int32, from its `start` in each example; segments int32, 1, 2, ... by example and 0 for
        padding; loss_mask float32, 1 where the token is a training target.
    """
    tokens = np.full((len(rows), length), pad_id, np.int32)
    positions, segments = np.zeros((2, len(rows), length), np.int32)
    loss_mask = np.zeros((len(rows), length), np.float32)
    for row, examples in enumerate(rows):
        begin = 0
        for segment, example in enumerate(examples, start=1):
            part = slice(begin, begin + len(example.tokens))
            tokens[row, part] = example.tokens
            positions[row, part] = np.arange(example.start, example.start + len(example.tokens))
            segments[row, part] = segment
            loss_mask[row, part] = example.loss_mask
            begin = part.stop
    return {"tokens": tokens, "positions": positions, "segments": segments, "loss_mask": loss_mask}


def bucket_lengths(longest_rows: Sequence[int], num_buckets: int, multiple: int) -> list[int]:
    """The row lengths to compile, at most `num_buckets`, ascending; the last one holds the longest row of all.

    They minimise the tokens of the batches, each padded to the shortest length that holds it. Exact up to
    MAX_CANDIDATES different lengths; beyond that, chosen among so many of them.

    Args:
        longest_rows: tokens of the longest row of each batch.
        num_buckets: at most this many lengths.
        multiple: every length is a multiple of this.
    """
    candidates, counts = np.unique(-(-np.asarray(longest_rows, np.int64) // multiple) * multiple, return_counts=True)
    # share[j]: the share of batches that fit into candidate j; share[-1] is 1
    share = np.cumsum(counts) / counts.sum()
    if len(candidates) > MAX_CANDIDATES:
        chosen = np.linspace(0, len(candidates) - 1, MAX_CANDIDATES).round().astype(int)
        candidates, share = candidates[chosen], share[chosen]
    # cost[j]: least tokens for the batches that fit into candidate j, with the buckets so far and j as their largest
    cost, previous = candidates * share, []
    smaller = np.tri(len(candidates), k=-1, dtype=bool)
    for _ in range(min(num_buckets, len(candidates)) - 1):
        with_one_more = cost[None, :] + candidates[:, None] * (share[:, None] - share[None, :])
        with_one_more = np.where(smaller, with_one_more, np.inf)
        previous.append(with_one_more.argmin(axis=1))
        cost = with_one_more.min(axis=1)
    chosen = [len(candidates) - 1]
    for choice in reversed(previous):
        chosen.append(choice[chosen[-1]])
    return [int(candidates[j]) for j in reversed(chosen)]
