"""Rows as typed rows: which type they are of, blocks of them that are read column by column, and bad rows."""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxpost.data.bad_rows import BadRows
from jaxpost.data.messages import COMPLETIONS, Part, is_conversational, messages_fault, text_fault
from jaxpost.data.normalize import normalize
from jaxpost.data.rows import BLOCK, Row, RowError, as_rows, cell_error, describe
from jaxpost.errors import DataError

DatasetType = Literal[
    "tokenized",
    "preference",
    "unpaired_preference",
    "stepwise",
    "prompt_completion",
    "language_modeling",
    "prompt_only",
]

IGNORE = -100  # the label of a token that is not trained on
MASKS = {"labels", "completion_mask", "assistant_masks"}
# The columns that show each type, in the order in which they are looked for; the text column of language_modeling has
# whatever name dataset_text_field gives it.
TYPE_COLUMNS: dict[DatasetType, tuple[str, ...]] = {
    "tokenized": ("input_ids",),
    "preference": ("chosen", "rejected"),
    "unpaired_preference": ("prompt", "completion", "label"),
    "stepwise": ("prompt", "completions", "labels"),
    "prompt_completion": ("prompt", "completion"),
    "language_modeling": ("messages",),
    "prompt_only": ("prompt",),
}


def detect_type(
    columns: Sequence[str],
    first_row: Mapping[str, Any],
    text_field: str = "text",
    name: str = "the dataset",
    accepted: Collection[DatasetType] = tuple(TYPE_COLUMNS),
) -> DatasetType:
    """The type of the rows, from the names of their columns; standard or conversational is told by the values.

    Where several fit, the order is that of TYPE_COLUMNS among the `accepted`: the types that a method can train on. The
    first row only chooses between `messages` and `text_field`, where a dataset has both and one of them is null.

    Raises:
        DataError: no accepted columns; lists those found and those accepted.
    """
    for kind, needed in TYPE_COLUMNS.items():
        if kind == "language_modeling":
            fits = language_modeling_column(columns, first_row, text_field) is not None
        else:
            fits = set(needed) <= set(columns)
        if fits and kind in accepted:
            return kind
    wanted = [" with ".join(map(repr, needed)) for kind, needed in TYPE_COLUMNS.items() if kind in accepted]
    if "language_modeling" in accepted:
        wanted.append(f"{text_field!r} (named by --dataset_text_field)")
    raise DataError(f"{name} has the columns {', '.join(columns) or '(none)'}; accepted are {', or '.join(wanted)}")


def language_modeling_column(columns: Sequence[str], first_row: Mapping[str, Any], text_field: str) -> str | None:
    """The column that holds the text or the messages of a language-modelling row; None if there is none."""
    found = [column for column in ("messages", text_field) if column in columns]
    filled = [column for column in found if first_row.get(column) is not None]
    return (filled or found or [None])[0]


class RowType(NamedTuple):
    """The type of the rows of a dataset, the column that shows it, and whether that holds messages rather than text."""

    kind: DatasetType
    column: str
    conversational: bool

    def __str__(self) -> str:
        return f"{self.kind} with {'messages' if self.conversational else 'no messages'}"


def row_type(
    block: "Block", text_field: str = "text", accepted: Collection[DatasetType] = tuple(TYPE_COLUMNS)
) -> RowType:
    """The type of a dataset's rows, from its first block; a first row that is bad does not mislead it.

    Raises:
        DataError: as `detect_type`.
    """
    columns, first_row = list(block.columns), {column: cells[0] for column, cells in block.columns.items()}
    kind = detect_type(columns, first_row, text_field, block.name, accepted)
    column = language_modeling_column(columns, first_row, text_field) if kind == "language_modeling" else None
    column = column or TYPE_COLUMNS[kind][0]
    told = (cell for cell in block.columns[column] if isinstance(cell, str | list) and cell)
    return RowType(kind, column, is_conversational(next(told, None)))


@dataclass(frozen=True)
class Block:
    """Consecutive rows as columns, each readable as one type; the wrong type is a RowError that names row and column.

    Attributes:
        columns: the cells by column; None where a row has none.
        first: number of the block's first row in the dataset, from 0; rows that were left out count.
        name: the dataset's name in messages.
        rows: the rows themselves, which know where they stand; by default they are counted from `first`.
    """

    columns: Mapping[str, list[Any]]
    first: int
    name: str
    rows: Sequence[Row] = ()

    def __len__(self) -> int:
        return len(self.rows) or max(map(len, self.columns.values()), default=0)

    def part(self, start: int, stop: int) -> "Block":
        """The rows from `start` to before `stop`."""
        columns = {column: cells[start:stop] for column, cells in self.columns.items()}
        return replace(self, columns=columns, first=self.first + start, rows=self.rows[start:stop])

    def place(self, i: int) -> str:
        """The name of a row in messages."""
        return self.rows[i].place if self.rows else f"{self.name}, row {self.first + i + 1}"

    def where(self, i: int, column: str) -> str:
        """The name of a cell in messages."""
        return f"{self.place(i)}, column {self._alias(i, column)!r}"

    def error(self, i: int, column: str, fault: str, found: str = "") -> RowError:
        """An error that leaves out row `i` under `on_bad_row skip`; counted by the column and the `fault`."""
        return cell_error(self.place(i), self._alias(i, column), fault, found)

    def cells(self, column: str, default: Any = None) -> list[Any]:
        """A column that need not be there, with `default` in place of null."""
        return [default if cell is None else cell for cell in self.columns.get(column) or [None] * len(self)]

    def texts(self, column: str) -> list[str]:
        """A column of text; a completion is not empty."""
        for i, value in enumerate(self.columns[column]):
            if fault := text_fault(value):
                raise self.error(i, column, *fault)
            if not value and column in COMPLETIONS:
                raise self.error(i, column, " is empty")
        return self.columns[column]

    def messages(self, column: str) -> list[list[dict[str, Any]]]:
        """A column of messages; keys that are null (as Arrow fills them in) are left out.

        Which orders of roles are right depends on the part of a conversation that the column holds.
        """
        part = "completion" if column in COMPLETIONS else "prompt" if column == "prompt" else "conversation"
        return [self.checked_messages(i, column, value, part) for i, value in enumerate(self.columns[column])]

    def checked_messages(self, i: int, column: str, value: Any, part: Part) -> list[dict[str, Any]]:
        """A cell of row `i`, or a piece of it, as the messages of that part of a conversation."""
        if fault := messages_fault(value, part):
            raise self.error(i, column, *fault)
        return [{key: item for key, item in message.items() if item is not None} for message in value]

    def tools(self) -> list[list[Any] | None]:
        """The tools of each row as JSON schemas, from a list of them or its JSON; None where there are none."""
        return [self._tools(i, value) for i, value in enumerate(self.cells("tools"))]

    def template_kwargs(self) -> list[dict[str, Any]]:
        """What each row's `chat_template_kwargs` gives to the chat template."""
        found = self.cells("chat_template_kwargs", {})
        for i, value in enumerate(found):
            if not isinstance(value, Mapping):
                raise self.error(i, "chat_template_kwargs", " must be an object", f", not {describe(value)}")
        return found

    def booleans(self, column: str) -> list[bool]:
        """A column of true and false, or 1 and 0."""
        for i, value in enumerate(self.columns[column]):
            if not isinstance(value, int) or value not in (0, 1):
                raise self.error(i, column, " must be true or false", f", not {describe(value)}")
        return [bool(value) for value in self.columns[column]]

    def numbers(self, column: str) -> list[float]:
        """A column of finite numbers."""
        for i, value in enumerate(self.columns[column]):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise self.error(i, column, " must be a finite number", f", not {describe(value)}")
        return [float(value) for value in self.columns[column]]

    def integers(self, column: str, i: int, below: int, length: int | None = None, ignore: int = 0) -> np.ndarray:
        """Row `i` of a column of ids, labels or masks as int64 [T]: 0 <= value < `below`, or `ignore`; T = `length`."""
        value = self.columns[column][i]
        if not isinstance(value, list) or not set(map(type, value)) <= {int, bool}:
            raise self.error(i, column, " must be a list of whole numbers", f", not {describe(value)}")
        if length is not None and len(value) != length:
            raise self.error(i, column, " has not one value for each of input_ids", f": {len(value)} for {length}")
        limits = f": a value is out of range 0..{below - 1}"
        try:
            values = np.array(value, np.int64)
        except OverflowError as error:
            raise self.error(i, column, limits) from error
        for t in np.flatnonzero(((values < 0) | (values >= below)) & (values != ignore))[:1]:
            raise self.error(i, column, limits, f", {values[t]} at position {t} (from 0)")
        return values

    def label_mask(self, i: int, ids: np.ndarray, below: int) -> np.ndarray:
        """Row `i` of `labels` as bool [T]: which of its tokens `ids` are trained, all but those labelled IGNORE."""
        labels = self.integers("labels", i, below, len(ids), IGNORE)
        mask = labels != IGNORE
        for t in np.flatnonzero(mask[1:] & (labels[1:] != ids[1:]))[:1] + 1:
            found = f", {labels[t]} at position {t} (from 0), where the token is {ids[t]}"
            raise self.error(i, "labels", f": a label must be its own token, not the next one, or {IGNORE}", found)
        return mask

    def _alias(self, i: int, column: str) -> str:
        """The name of a column in the file, where normalising has renamed it."""
        return self.rows[i].aliases.get(column, column) if self.rows else column

    def _tools(self, i: int, value: Any) -> list[Any] | None:
        try:
            tools = json.loads(value) if isinstance(value, str) and value else value
        except (ValueError, RecursionError):
            tools = value
        if not tools and not isinstance(tools, bool | int):
            return None  # not []: a template would write the heading of a list of tools
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise self.error(i, "tools", " must be a list of JSON schemas, or its JSON", f", not {describe(value)}")
        return tools


def blocks(rows: Any, name: str, bad_rows: BadRows | None = None, start: int = 0) -> Iterator[Block]:
    """The rows from number `start` on, normalised, BLOCK of the dataset's at a time, less those that are bad.

    Args:
        rows: what `as_rows` takes.
        name: of the dataset, for rows that do not know where they stand.
        bad_rows: what to do with a row that cannot be parsed or normalised; by default an error.
        start: the number of the first row, from 0.

    Raises:
        DataError: there are no rows, or none that can be used; or a column of labels or masks first appears in a later
            block, when rows have been read without it.
    """
    bad_rows, columns, first, empty = bad_rows or BadRows(), {}, start, True
    source = as_rows(rows, name)(start)
    while batch := list(islice(source, BLOCK)):
        if good := list(_usable(batch, bad_rows)):
            if not empty:
                _check_masks(good, columns)
            columns |= dict.fromkeys(column for row in good for column in row.cells)
            cells = {column: [row.cells.get(column) for row in good] for column in columns}
            yield Block(cells, first, name, good)
            empty = False
        first += len(batch)
    if empty and start == 0:
        raise DataError(f"{name} has no rows" if first == 0 else f"{name} has no row that can be used; {bad_rows}")


def _check_masks(rows: Sequence[Row], columns: Mapping[str, None]) -> None:
    for row in rows:
        if late := MASKS & row.cells.keys() - columns.keys():
            raise DataError(f"{row.place}, column {min(late)!r} is missing in all of the rows before")


def _usable(batch: Sequence[Row | RowError], bad_rows: BadRows) -> Iterator[Row]:
    for row in batch:
        try:
            if isinstance(row, RowError):
                raise row
            good = normalize(row)
        except RowError as error:
            bad_rows.refuse(error)
        else:
            yield good
