"""Rows to examples: the driver that reads rows a block at a time, cuts what is long and counts what is left out.

What a row's tokens are is for a reader to say: `data.chat` has that of fine-tuning, `data.completions` those of
completions that are compared or judged.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxpost.data.bad_rows import BadRows
from jaxpost.data.formats import Block, blocks
from jaxpost.data.rows import RowError
from jaxpost.errors import ConfigError, DataError
from jaxpost.options import Group, check_choices, option

logger = logging.getLogger(__name__)


class Example(NamedTuple):
    """A text, ready to be padded.

    Attributes:
        tokens: int32 [T].
        loss_mask: bool [T]; True where this token is a training target, predicted from the tokens before it. The first
            token has none before it, so it is never one.
        value: what the method knows of it beside: a label, a margin.
        start: tokens before its own that it shares with the example at the beginning of its pack.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    value: float = 0.0
    start: int = 0


Unit = tuple[Example, ...]  # examples that are kept or left out together


class Reading(NamedTuple):
    """What a reader makes of a block.

    Attributes:
        units: each with the number of its row in the block.
        parted: rows whose prompt is not the first tokens of its prompt with completion.
    """

    units: list[tuple[int, Unit]]
    parted: int = 0


Reader = Callable[[Block], Reading]


@dataclass
class Counts:
    """What has become of the rows so far.

    Attributes:
        kept: yielded, cut or not.
        dropped: left out since they have no token to train on.
        truncated: those of the kept that were cut.
        too_long: left out since they are over max_length.
    """

    kept: int = 0
    dropped: int = 0
    truncated: int = 0
    too_long: int = 0


ON_LONG_ROW = ("truncate", "drop", "error")


@dataclass(frozen=True, kw_only=True)
class LengthConfig:
    """How long a text may be; TRL's names and defaults."""

    help_group = Group.DATA

    max_length: int | None = option(1024, "Tokens a row may have (see on_long_row), null for no limit.")
    truncation_mode: str = option(
        "keep_start",
        "Which end of a row over max_length to keep: keep_start, keep_end.",
        choices=("keep_start", "keep_end"),
    )
    on_long_row: str = option(
        "truncate",
        "What becomes of a row over max_length: truncate (truncation_mode says which end stays), drop or error.",
        choices=ON_LONG_ROW,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; a row needs at least 2 tokens to train on")


def read_examples(
    rows: Any,
    open_reader: Callable[[Block], Reader],
    config: LengthConfig,
    *,
    name: str = "the dataset",
    bad_rows: BadRows | None = None,
    counts: Counts | None = None,
) -> Iterator[Unit]:
    """Units of examples from rows (what `as_rows` takes), less those without a trained token.

    Args:
        rows: read a block at a time, as their examples are taken.
        open_reader: the reader of these rows, by their first block.
        config: what becomes of long ones.
        name: of the dataset in messages, where rows are counted from 1.
        bad_rows: decides what becomes of rows that cannot be used; by default the first one is an error.
        counts: added to.

    Raises:
        DataError: no rows, wrong columns, a bad cell, or, after the last row, nothing to train on.
        ConfigError: an option, the tokenizer or its chat template does not fit the rows.
    """
    bad_rows, counts = bad_rows or BadRows(), counts or Counts()
    read, seen, kept, parted = None, 0, 0, 0
    for block in blocks(rows, name, bad_rows):
        read = read or open_reader(block)
        for part, reading in bad_rows.attempt(block, read):
            parted += reading.parted
            seen += len(reading.units)
            for row, unit in reading.units:
                fitted = _fitted(unit, part.place(row), config, bad_rows, counts)
                if fitted is not None:
                    kept += 1
                    yield fitted
    if not kept:
        found = f"{name}: none of the {seen} rows has a token to train on within max_length {config.max_length}"
        skipped = f"; {bad_rows}" if bad_rows.counts else ""
        raise DataError(f"{found} ({config.truncation_mode}); raise --max_length or check what is masked{skipped}")
    if parted:
        found = f"{name}: {parted} of {seen} prompts are not the first tokens of their prompt + completion"
        logger.warning(f"{found}; there the completion starts where they part, not where generation would start")


def flattened(units: Iterable[Unit]) -> Iterator[Example]:
    """The examples of units, one after the other."""
    return (example for unit in units for example in unit)


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def _fitted(unit: Unit, place: str, config: LengthConfig, bad_rows: BadRows, counts: Counts) -> Unit | None:
    """Examples of at most max_length tokens, counted; None if they are left out. First tokens are no targets."""
    limit, length = config.max_length or sys.maxsize, max(len(example.tokens) for example in unit)
    if length > limit:
        if config.on_long_row == "error":
            found = f"{length:,} tokens, more than max_length {limit:,}"
            remedy = "raise --max_length, or set --on_long_row to truncate or drop"
            bad_rows.refuse(RowError(f"{place} has {found}; {remedy}", "more tokens than max_length"))
            return None
        if config.on_long_row == "drop":
            counts.too_long += 1
            return None
        kept = slice(limit) if config.truncation_mode == "keep_start" else slice(-limit, None)
        unit = tuple(Example(ex.tokens[kept].copy(), ex.loss_mask[kept].copy(), ex.value) for ex in unit)
    for example in unit:
        example.loss_mask[:1] = False
    if not all(example.loss_mask.any() for example in unit):
        counts.dropped += 1
        return None
    counts.kept += 1
    counts.truncated += length > limit
    return unit
