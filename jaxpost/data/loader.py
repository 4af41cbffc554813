"""Examples to padded batches: a global order that is a function of the seed alone, one slice for each process."""

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxpost.data.chat import Example
from jaxpost.errors import ConfigError
from jaxpost.options import one_of, option

SAMPLING = ("random", "sequential", "group_by_length")
MEGA_BATCHES = 50  # batches that group_by_length sorts together, as in transformers
MAX_CANDIDATES = 1024  # lengths among which the buckets are chosen
PREFETCH_THREADS = 2
PREFETCH_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How examples become batches; the names and defaults of transformers and TRL where they have them."""

    per_device_train_batch_size: int = option(8, "rows per data-parallel group in one micro-batch of training")
    per_device_eval_batch_size: int = option(8, "rows per data-parallel group in one batch of evaluation")
    gradient_accumulation_steps: int = option(1, "micro-batches whose gradients one optimizer step adds up")
    train_sampling_strategy: str = option("random", "order of the training rows: random, sequential, group_by_length")
    pad_to_multiple_of: int | None = option(None, "round padded lengths up to this; null: 8 on CPU, 128 elsewhere")
    length_buckets: int = option(1, "number of padded lengths; each is compiled once")
    data_seed: int | None = option(None, "seed of the order of the rows; null: seed")

    def __post_init__(self) -> None:
        one_of("train_sampling_strategy", self.train_sampling_strategy, SAMPLING)
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
    """Batches of examples in an order that depends on the seed and the epoch only, not on the number of processes.

    Every epoch has each example once, in a fresh order. Its last batch is filled up with empty rows. All processes get
    the same padded length: the shortest of `lengths` that holds the longest row of the global batch.

    Args:
        examples: what to load.
        global_batch_size: rows of one batch over all processes; `process_count` must divide it.
        pad_id: token id in the padding.
        seed: not negative.
        sampling: random, sequential or group_by_length.
        num_epochs: when iteration ends, rounded up to a step; None for never.
        lengths: padded lengths in tokens, ascending, from `bucket_lengths`.

    Raises:
        ConfigError: the global batch cannot be divided among the processes, or there is no such sampling.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        global_batch_size: int,
        pad_id: int,
        seed: int,
        sampling: str,
        num_epochs: float | None,
        lengths: Sequence[int],
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        one_of("train_sampling_strategy", sampling, SAMPLING)
        if global_batch_size % process_count:
            raise ConfigError(
                f"a global batch of {global_batch_size} rows cannot be divided among {process_count} processes; change "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        self._sizes = np.array([len(example.tokens) for example in examples], np.int64)
        assert len(examples) > 0 and list(lengths) == sorted(lengths) and self._sizes.max() <= lengths[-1]
        self._examples, self._lengths = examples, np.asarray(lengths)
        self._global_batch_size, self._pad_id, self._seed, self._sampling = global_batch_size, pad_id, seed, sampling
        self._process_index, self._process_count = process_index, process_count
        self._cached_order = functools.lru_cache(maxsize=2)(self.epoch_order)
        self.steps_per_epoch = math.ceil(len(examples) / global_batch_size)
        self.num_steps = None if num_epochs is None else math.ceil(num_epochs * self.steps_per_epoch)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Indices of the examples, int64 [N], in the order of this epoch."""
        count, size = len(self._examples), self._global_batch_size
        if self._sampling == "sequential":
            return np.arange(count)
        # Raw bits and a stable sort, because numpy keeps the bit streams between versions, but not `permutation`.
        bits = np.random.Philox(np.random.SeedSequence([self._seed, epoch])).random_raw(count)
        order = np.argsort(bits, kind="stable")
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

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of global batch number `step`, from 0 and across epochs; the arrays of `collate`."""
        epoch, index = divmod(step, self.steps_per_epoch)
        size = self._global_batch_size
        rows = self._cached_order(epoch)[index * size : (index + 1) * size]
        length = int(self._lengths[np.searchsorted(self._lengths, self._sizes[rows].max())])
        share = size // self._process_count
        mine = rows[self._process_index * share : (self._process_index + 1) * share]
        return collate([self._examples[i] for i in mine], length, share, self._pad_id)

    def __call__(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Iterate over the batches from number `start_step` on, made ahead of their use in background threads."""
        import grain

        stop = sys.maxsize if self.num_steps is None else max(start_step, self.num_steps)
        options = grain.ReadOptions(num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
        return iter(grain.MapDataset.range(start_step, stop).map(self.batch).to_iter_dataset(options))


def collate(examples: Sequence[Example], length: int, num_rows: int, pad_id: int) -> dict[str, np.ndarray]:
    """Pad examples on the right to [B, T] = [num_rows, length]; rows beyond the examples are all padding.

    Returns:
        tokens int32; positions int32, from 0 in each row; segments int32, 1 for tokens and 0 for padding; loss_mask
        float32, 1 where the token is a training target.
    """
    tokens = np.full((num_rows, length), pad_id, np.int32)
    positions, segments = np.zeros((2, num_rows, length), np.int32)
    loss_mask = np.zeros((num_rows, length), np.float32)
    for row, example in enumerate(examples):
        size = len(example.tokens)
        tokens[row, :size] = example.tokens
        positions[row, :size] = np.arange(size)
        segments[row, :size] = 1
        loss_mask[row, :size] = example.loss_mask
    return {"tokens": tokens, "positions": positions, "segments": segments, "loss_mask": loss_mask}


def bucket_lengths(
    lengths_of_examples: Sequence[int], max_length: int | None, num_buckets: int, multiple: int, rows_per_batch: int = 1
) -> list[int]:
    """The padded lengths to compile, at most `num_buckets`, ascending; the last one holds the longest example.

    They minimise the tokens of the batches, each padded to the shortest length that holds it, where the longest of
    `rows_per_batch` random rows sets a batch's length (1: rows of one length share a batch). Exact up to
    MAX_CANDIDATES different lengths; beyond that, chosen among so many of them.

    Args:
        lengths_of_examples: in tokens; more than `max_length` (None for no limit) counts as `max_length`.
        multiple: every length is a multiple of this.
    """
    limited = np.minimum(np.asarray(lengths_of_examples, np.int64), sys.maxsize if max_length is None else max_length)
    candidates, counts = np.unique(-(-limited // multiple) * multiple, return_counts=True)
    # share[j]: the share of batches that fit into candidate j; share[-1] is 1
    share = (np.cumsum(counts) / counts.sum()) ** rows_per_batch
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
