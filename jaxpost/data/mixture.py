"""The rows of a run: one dataset or a mixture of several, and the rows held out of them for evaluation."""

import dataclasses
import heapq
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from jaxpost.data.bad_rows import BadRows
from jaxpost.data.formats import TYPE_COLUMNS, DatasetType, RowType, blocks, row_type
from jaxpost.data.rows import Row, RowError, Rows, identity, join, take
from jaxpost.data.sources import DataFiles, DatasetConfig, load_rows
from jaxpost.errors import ConfigError, DataError
from jaxpost.options import nearest

SAMPLE = 100  # rows that tell the type of a dataset in a mixture


@dataclass(frozen=True, kw_only=True)
class Member:
    """One entry of `datasets`; the names are TRL's, but for `weight`.

    Attributes:
        path: as `dataset_name`; or json, parquet or arrow, where `data_files` names the files.
        name: configuration of the dataset, where it has several.
        data_dir: folder in the dataset.
        data_files: files or globs in the dataset.
        split: which split.
        columns: those to keep; null for all.
        fraction: target share of the mixture.
        weight: how often its rows come, beside those of the others.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: DataFiles | None = None
    split: str = "train"
    columns: Sequence[str] | None = None
    fraction: float | None = None
    weight: float | None = None


def load_datasets(
    config: DatasetConfig,
    *,
    seed: int,
    evaluates: bool,
    text_field: str = "text",
    accepted: Collection[DatasetType] = tuple(TYPE_COLUMNS),
) -> tuple[Rows, Rows | None]:
    """The training rows that a run is configured with, and those to evaluate on if it `evaluates`.

    With `test_split_size` the latter are held out of the former, even if nothing is evaluated, so that a run trains on
    the same rows either way.

    Raises:
        ConfigError: what was asked for does not fit together.
        DataError: rows cannot be read.
    """
    if not config.datasets and config.dataset_name is None:
        raise ConfigError("no data: give --dataset_name (a file, a folder, a glob or a hub id), or datasets")
    if config.datasets:
        members = [parse_member(entry, n) for n, entry in enumerate(config.datasets, start=1)]
        options = {"streaming": config.dataset_streaming, "text_field": text_field, "accepted": accepted}
        train = mix(members, seed=seed, **options)
    else:
        train = _load(config, config.dataset_train_split)
    if config.test_split_size is not None:
        train, held_out = hold_out(train, config.test_split_size, seed)
        return train, held_out if evaluates else None
    if not evaluates:
        return train, None
    if config.datasets:
        raise ConfigError("a mixture has no test split to evaluate on; give --test_split_size")
    return train, _load(config, config.dataset_test_split)


def _load(config: DatasetConfig, split: str) -> Rows:
    return load_rows(str(config.dataset_name), split, config.dataset_config, streaming=config.dataset_streaming)


def parse_member(entry: Any, number: int) -> Member:
    """An entry of `datasets` as it stands in YAML or JSON, the `number`-th from 1.

    Raises:
        ConfigError: an unknown key, a missing path or a value of the wrong type.
    """
    where = f"datasets, entry {number}"
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} is {entry!r}; it must be a mapping with a path")
    fields = [field.name for field in dataclasses.fields(Member)]
    for key in entry:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, fields)}; keys are {', '.join(fields)}")
    given = {key: value for key, value in entry.items() if value is not None}
    if "path" not in given:
        raise ConfigError(f"{where} has no path: a file, a folder, a glob or a hub id")
    for key in ("path", "name", "data_dir", "split"):
        if not isinstance(given.get(key, ""), str):
            raise ConfigError(f"{where}: {key} is {given[key]!r}; it must be text")
    columns, files = given.get("columns", []), given.get("data_files", "")
    if not isinstance(columns, list) or not all(isinstance(column, str) for column in columns):
        raise ConfigError(f"{where}: columns is {columns!r}; it must be a list of names")
    if not isinstance(files, str | list | Mapping):
        raise ConfigError(f"{where}: data_files is {files!r}; it must be a file, a list of them or a mapping of splits")
    shares = {key: _share(given[key], f"{where}: {key}") for key in ("fraction", "weight") if key in given}
    return Member(**{**given, **shares})


def _share(value: Any, where: str) -> float:
    """A number that is not negative; text is converted, because YAML takes 1e-1 for text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ConfigError(f"{where} is {value!r}; it must be a number that is not negative")
    return number


def mix(
    members: Sequence[Member],
    *,
    seed: int,
    streaming: bool = False,
    text_field: str = "text",
    accepted: Collection[DatasetType] = tuple(TYPE_COLUMNS),
) -> Rows:
    """The rows of several datasets as one.

    - Without shares: all rows of the first, then of the second, and so on.
    - `fraction`, as in TRL: shares of the whole, which is as large as it can be without a row twice; the first rows of
      each, one dataset after the other. Needs the numbers of rows, so it is not for streams.
    - `weight`: the datasets take turns, so that the first n rows, for every n, hold them in these proportions, to
      within a row for each dataset. How the turns begin is drawn from the seed. It ends where a dataset has no more
      rows for its turn, so that none comes twice.

    Raises:
        ConfigError: some members have a share and some none, or shares of both kinds, or none is positive.
        DataError: a dataset cannot be read, lacks a column, or has rows of another type than the first.
    """
    kinds = {kind for member in members for kind in ("fraction", "weight") if getattr(member, kind) is not None}
    shares = [member.weight if member.fraction is None else member.fraction for member in members]
    if len(kinds) > 1 or (kinds and None in shares):
        raise ConfigError("datasets: give every entry a fraction, or every entry a weight, or none of them either")
    if kinds and not sum(share or 0 for share in shares):
        raise ConfigError(f"datasets: every {kinds.pop()} is 0")
    drawn = [(member, share) for member, share in zip(members, shares, strict=True) if share != 0]
    parts = [_open(member, streaming) for member, _ in drawn]
    _check_types(parts, text_field, accepted)
    weights = [share or 0 for _, share in drawn]
    if kinds == {"fraction"}:
        return join(_fractions(parts, weights), "the mixture")
    return interleave(parts, weights, seed) if kinds else join(parts, "the mixture")


def _open(member: Member, streaming: bool) -> Rows:
    options = {"data_dir": member.data_dir, "data_files": member.data_files, "streaming": streaming}
    rows = load_rows(member.path, member.split, member.name, **options)
    return rows if member.columns is None else select(rows, member.columns)


def select(rows: Rows, columns: Sequence[str]) -> Rows:
    """The rows with those columns only.

    Raises:
        DataError: one of them is not there.
    """
    found = rows.column_names
    for column in columns:
        if column not in found:
            remedy = f"{nearest(column, found)}; columns found: {', '.join(found)}"
            raise DataError(f"{rows.name} has no column {column!r}{remedy}")

    def read(start: int) -> Iterator[Row | RowError]:
        for row in rows(start):
            if isinstance(row, RowError):
                yield row
            else:
                yield row._replace(cells={column: row.cells[column] for column in columns if column in row.cells})

    return Rows(rows.name, read, rows.measure, identity([rows], "select", *columns))


def _check_types(parts: Sequence[Rows], text_field: str, accepted: Collection[DatasetType]) -> None:
    """Raise unless the first rows of all parts are of one type, and all standard or all conversational."""
    first = None
    for part in parts:
        kind = type_of(part, text_field, accepted)
        if first is not None and str(kind) != first[0]:
            told = f"{first[1]} is {first[0]}, but {part.name} is {kind} (told by column {kind.column!r})"
            raise DataError(f"a mixture must be of one type: {told}")
        first = first or (str(kind), part.name)


def type_of(rows: Rows, text_field: str = "text", accepted: Collection[DatasetType] = tuple(TYPE_COLUMNS)) -> RowType:
    """The type of rows, from the first of them that can be used.

    Raises:
        DataError: none can, or their columns are not accepted.
    """
    return row_type(next(blocks(take(rows, SAMPLE), rows.name, BadRows("skip"))), text_field, accepted)


def _fractions(parts: Sequence[Rows], shares: Sequence[float]) -> list[Rows]:
    """The first rows of each part, so many that they make up those shares of the largest mixture that repeats none."""
    for part in parts:
        if part.size is None:
            raise ConfigError(f"datasets: {part.name} is a stream, which can have a weight, but no fraction")
    shares = [share / sum(shares) for share in shares]  # first, as in TRL, so that halves are rounded alike
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    return [take(part, round(share * total)) for part, share in zip(parts, shares, strict=True)]


def interleave(parts: Sequence[Rows], weights: Sequence[float], seed: int) -> Rows:
    """The rows of the parts in turn, as often as their weights say, until one has no more."""
    phases = (np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(parts)) / 2.0**64).tolist()

    def turns() -> Iterator[int]:
        """Row t of part p has its turn at the time (t + phase[p]) / weight[p]."""
        queue = [(phase / weight, p, 0) for p, (phase, weight) in enumerate(zip(phases, weights, strict=True))]
        heapq.heapify(queue)
        while True:
            _, p, t = queue[0]
            yield p
            heapq.heapreplace(queue, ((t + 1 + phases[p]) / weights[p], p, t + 1))

    def read(start: int) -> Iterator[Row | RowError]:
        order = turns()
        taken = Counter(islice(order, start))
        sources = [part(taken[p]) for p, part in enumerate(parts)]
        for p in order:
            row = next(sources[p], None)
            if row is None:
                return
            yield row

    def measure() -> int:
        left = [len(part) for part in parts]
        for n, p in enumerate(turns()):
            if left[p] == 0:
                return n
            left[p] -= 1
        raise AssertionError("turns never end")

    sized = all(part.measure is not None for part in parts)
    how = ("interleave", seed, *weights)
    return Rows("the mixture", read, measure if sized else None, identity(parts, *how))


def hold_out(rows: Rows, size: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows into those to train on and those to test on, each in their order; which is drawn from the seed.

    Args:
        rows: not a stream.
        size: of the test rows: a share below 1, of which the number is rounded up, or their number.
        seed: not negative.

    Raises:
        ConfigError: one of the two would be empty, or there is no knowing the number of rows.
    """
    if rows.size is None:
        raise ConfigError(f"test_split_size needs the number of rows, which the stream {rows.name} does not tell")
    num_test = math.ceil(size * rows.size) if size < 1 else int(size)
    if not 0 < num_test < rows.size:
        raise ConfigError(f"test_split_size {size:g} takes {num_test} of the {rows.size} rows; both parts need rows")
    # Raw bits and a stable sort, because numpy keeps the bit streams between versions, but not `permutation`.
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(rows.size)
    is_test = np.zeros(rows.size, bool)
    is_test[np.argsort(bits, kind="stable")[:num_test]] = True
    return _chosen(rows, ~is_test), _chosen(rows, is_test)


def _chosen(rows: Rows, mask: np.ndarray) -> Rows:
    """The rows where the mask is true."""
    numbers = np.flatnonzero(mask)

    def read(start: int) -> Iterator[Row | RowError]:
        if start < len(numbers):
            first = int(numbers[start])
            yield from (row for row, is_chosen in zip(rows(first), mask[first:], strict=False) if is_chosen)

    return Rows(rows.name, read, lambda: len(numbers), identity([rows], "chosen", numbers.tobytes()))
