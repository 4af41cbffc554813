"""Rows that can be read from any row on, again and again: of a list, a `datasets` object or a function.

Nothing is read before it is asked for and nothing is kept, so that memory does not grow with the number of rows.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxpost.data.fingerprint import digest
from jaxpost.errors import DataError, one_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BLOCK = 1000  # rows that are read, checked and tokenised at a time
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class Row(NamedTuple):
    """One row.

    Attributes:
        cells: the values by column.
        place: where the row stands, in messages: file or dataset, and number from 1.
        aliases: columns that normalising has made, and the columns of the file that they were made of.
    """

    cells: Mapping[str, Any]
    place: str
    aliases: Mapping[str, str] = {}


class RowError(DataError):
    """One row cannot be used.

    Attributes:
        reason: the message without the place and the value, which rows that are left out are counted by.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def cell_error(place: str, column: str, fault: str, found: str = "") -> RowError:
    """The error of a cell: what is wrong with such cells, and what was found in this one."""
    return RowError(f"{place}, column {column!r}{fault}{found}", f"column {column!r}{fault}")


@dataclass(frozen=True)
class Rows:
    """A sequence of rows that `read` yields from a given row on; a row that cannot be parsed is its RowError.

    Attributes:
        name: of the dataset, in messages.
        read: the rows from number n on, from 0.
        measure: the number of rows; None where only reading them all would tell.
        identify: a digest of the rows; None where it is not known.
    """

    name: str
    read: Callable[[int], Iterator[Row | RowError]]
    measure: Callable[[], int] | None = None
    identify: Callable[[], str | None] = lambda: None

    def __call__(self, start: int = 0) -> Iterator[Row | RowError]:
        """The rows from number `start` on, from 0; a run that resumes starts there."""
        return self.read(start)

    @cached_property
    def size(self) -> int | None:
        """The number of rows, None for a stream; a JSON-lines file is scanned for it."""
        return None if self.measure is None else self.measure()

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError(f"{self.name} is a stream, which has no length")
        return self.size

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """The cells of every row.

        Raises:
            RowError: a row cannot be parsed.
        """
        for row in self.read(0):
            if isinstance(row, RowError):
                raise row
            yield row.cells

    def __getitem__(self, column: str) -> list[Any]:
        """A column, None where a row has no such cell."""
        return [cells.get(column) for cells in self]

    @cached_property
    def column_names(self) -> list[str]:
        """The columns of the first rows."""
        first = (row.cells for row in islice(self.read(0), BLOCK) if isinstance(row, Row))
        return list(dict.fromkeys(chain.from_iterable(first)))


def as_rows(data: Any, name: str) -> Rows:
    """Rows of whatever holds them in Python.

    Args:
        data: Rows, a list of dicts, a `datasets.Dataset` or `IterableDataset`, or a function that returns an iterator
            of dicts, anew each time.
        name: of the dataset, in messages.

    Raises:
        DataError: something else; a one-way iterator among them, since every epoch and every resume reads anew.
    """
    if isinstance(data, Rows):
        return data
    if isinstance(data, list | tuple):
        return Rows(name, lambda start: _number(islice(data, start, None), name, start), lambda: len(data))
    import datasets

    if isinstance(data, datasets.Dataset):
        if data.format["type"] == "custom":
            raise DataError(f"{name} has a transform (set_transform), which would be ignored; use map() instead")
        # The digest that `datasets` keeps of what a dataset was made of, for its own cache.
        return Rows(name, lambda start: dataset_rows(data, name, start), lambda: len(data), lambda: data._fingerprint)
    if isinstance(data, datasets.IterableDataset):
        return Rows(name, lambda start: _stream_rows(data, name, start))
    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise DataError(f"{name} has the splits {', '.join(map(str, data)) or '(none)'}; give one of them")
    if callable(data):
        make: Callable[[], Any] = data
        return Rows(name, lambda start: _number(islice(make(), start, None), name, start))
    kind = type(data).__name__
    if isinstance(data, Iterator):
        raise DataError(f"{name} is a {kind}, which can be read only once; give the function that makes it, or a list")
    raise DataError(f"{name} is a {kind}; give a list of dicts, a datasets.Dataset or IterableDataset, or a function")


def dataset_rows(data: "Dataset", name: str, start: int = 0, first: int = 0) -> Iterator[Row | RowError]:
    """The rows of a `datasets.Dataset` from number `start` on, where its row 0 is number `first` of `name`."""
    plain = data.with_format(None)
    # Where a dict in a list lacks a key that another has, Arrow reads null; a dict that is stored as JSON has no such.
    padded = [field.name for field in plain.data.schema if "struct<" in str(field.type)]
    for begin in range(start, len(plain), BLOCK):
        cells_of_rows = _slice(plain, begin, min(begin + BLOCK, len(plain)))
        for number, cells in enumerate(cells_of_rows, start=first + begin + 1):
            place = f"{name}, row {number}"
            if cells is None:
                yield RowError(f"{place}: not valid UTF-8", "not valid UTF-8")
            else:
                yield Row({**cells, **{column: _without_nulls(cells[column]) for column in padded}}, place)


def take(rows: Rows, limit: int) -> Rows:
    """The first `limit` rows."""
    size = None if rows.measure is None else lambda: min(limit, len(rows))
    return Rows(
        rows.name, lambda start: islice(rows(start), max(0, limit - start)), size, identity([rows], "take", limit)
    )


def join(parts: Sequence[Rows], name: str) -> Rows:
    """The rows of one part after the other."""

    def read(start: int) -> Iterator[Row | RowError]:
        for part in parts:
            if start == 0:
                yield from part()
            elif part.size is None:  # how many rows it has shows only when it ends
                number = -1
                for number, row in enumerate(part()):
                    if number >= start:
                        yield row
                start = max(0, start - number - 1)
            else:
                yield from part(start) if start < part.size else ()
                start = max(0, start - part.size)

    sized = all(part.measure is not None for part in parts)
    return Rows(name, read, (lambda: sum(map(len, parts))) if sized else None, identity(parts, "join"))


def identity(parts: Sequence[Rows], *how: Any) -> Callable[[], str | None]:
    """The `identify` of rows that are made of others, in the way that `how` says."""

    def identify() -> str | None:
        known = [part.identify() for part in parts]
        return None if None in known else digest(*how, *known)

    return identify


def formatted(rows: Rows, function: Callable[[Mapping[str, Any]], str], column: str) -> Rows:
    """The text that a function of the user's makes of each row, as the one column of new rows."""

    def read(start: int) -> Iterator[Row | RowError]:
        for row in rows(start):
            yield row if isinstance(row, RowError) else _formatted(row, function, column)

    return Rows(rows.name, read, rows.measure)


def _formatted(row: Row, function: Callable[[Mapping[str, Any]], str], column: str) -> Row | RowError:
    try:
        text = function(row.cells)
    # Whatever the user's function raises is about this row.
    except Exception as error:
        fault = "formatting_func fails"
        return RowError(f"{row.place}: {fault} ({type(error).__name__}: {one_line(error)})", fault)
    if not isinstance(text, str):
        fault = "formatting_func must return text"
        return RowError(f"{row.place}: {fault}, not {describe(text)}", fault)
    return Row({column: text}, row.place)


def describe(value: Any) -> str:
    """What a cell holds instead of what it should, in a few words; quick for a value of any size."""
    if value is None:
        return "null or missing"
    kind = type(value).__name__
    return f"an empty {kind}" if isinstance(value, list | str) and not value else f"{kind} {short(value)}"


def short(value: Any) -> str:
    """The representation of a value, cut to a few words."""
    return _SHORT.repr(value)[:60]


def _number(rows: Iterator[Any], name: str, start: int) -> Iterator[Row | RowError]:
    for number, row in enumerate(rows, start=start + 1):
        yield checked_row(row, f"{name}, row {number}")


def checked_row(value: Any, place: str) -> Row | RowError:
    """A value as a row, or the error that it is none."""
    if isinstance(value, Mapping):
        return Row(value, place)
    fault = "a row must be an object with columns"
    return RowError(f"{place}: {fault}, not {describe(value)}", fault)


def _slice(plain: "Dataset", begin: int, end: int) -> list[dict[str, Any] | None]:
    """The cells of rows `begin` to `end`, None for a row with text that is no UTF-8, which Arrow does not check."""
    try:
        columns = plain[begin:end]
    except UnicodeDecodeError:
        middle = (begin + end) // 2
        return [None] if end - begin == 1 else [*_slice(plain, begin, middle), *_slice(plain, middle, end)]
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _stream_rows(data: "IterableDataset", name: str, start: int) -> Iterator[Row | RowError]:
    rows = iter(data.with_format(None).skip(start))
    for number in count(start + 1):
        try:
            cells = next(rows)
        except StopIteration:
            return
        # Whatever goes wrong behind it (the network, a broken file, a function of the user's) is about the data.
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise DataError(f"{name}, row {number}: cannot be read ({reason})") from error
        yield Row({column: _without_nulls(cell) for column, cell in cells.items()}, f"{name}, row {number}")


def _without_nulls(value: Any) -> Any:
    """A cell without the nulls in its dicts."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_without_nulls(item) for item in value]
    return value
