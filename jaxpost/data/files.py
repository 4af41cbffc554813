"""JSON, JSONL, Parquet and Arrow files as rows, which are read as they are asked for, a block at a time.

Only the array in a `.json` file is read as a whole.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpost.data.fingerprint import file_digest
from jaxpost.data.rows import BLOCK, Row, RowError, Rows, checked_row, dataset_rows
from jaxpost.errors import DataError, one_line

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_file(path: Path) -> Rows:
    """The rows of one file, by its suffix.

    Raises:
        DataError: no such kind of file, or it is empty, or its footer cannot be read. What else is wrong in it shows
            when it is read.
    """
    match path.suffix.lower():
        case ".json" | ".jsonl":
            return _json_array(path) if _starts_an_array(path) else _json_lines(path)
        case ".parquet":
            return _parquet_file(path)
        case ".arrow":
            return _arrow_file(path)
    raise DataError(f"{path}: cannot read this kind of file; give one that ends in {', '.join(SUFFIXES)}")


def _rows(path: Path, read: Callable[[int], Iterator[Row | RowError]], measure: Callable[[], int]) -> Rows:
    return Rows(str(path), read, measure, functools.partial(file_digest, path))


def _starts_an_array(path: Path) -> bool:
    return path.suffix.lower() == ".json" and re.match(rb"\s*\[", next(_lines(path))[1]) is not None


def _json_array(path: Path) -> Rows:
    """The objects of an array, which is parsed as a whole."""

    @functools.cache
    def rows() -> list[Row | RowError]:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        found = enumerate(_parse(data, path, 1), start=1)
        return [checked_row(value, f"{path}, row {number}") for number, value in found]

    return _rows(path, lambda start: iter(rows()[start:]), lambda: len(rows()))


def _json_lines(path: Path) -> Rows:
    def read(start: int) -> Iterator[Row | RowError]:
        for number, (line, data) in enumerate(_lines(path), start=1):
            if number > start:
                yield _parse_row(data, path, number, line)

    return _rows(path, read, lambda: sum(1 for _ in _lines(path)))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, and their numbers from 1."""
    empty = True
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                data = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).removesuffix(b"\n")
                if data and not data.isspace():
                    empty = False
                    yield number, data
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error
    if empty:
        raise DataError(f"{path} is empty")


def _parse_row(data: bytes, path: Path, number: int, line: int) -> Row | RowError:
    try:
        return checked_row(_parse(data, path, line), f"{path}, row {number}" + f" (line {line})" * (line != number))
    except RowError as error:
        return error


def _parse(data: bytes, path: Path, line: int) -> Any:
    """The JSON value in `data`, which starts at line number `line` of the file.

    Raises:
        RowError: it is not valid.
    """
    try:
        value = json.loads(data.decode("utf-8"))
        if SURROGATE.search(data):  # half of a pair is legal in JSON, but it is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise _json_fault(error, data, path, line) from error
    return value


def _json_fault(error: ValueError | RecursionError, data: bytes, path: Path, line: int) -> RowError:
    column, detail = "", ""
    match error:
        case UnicodeDecodeError():
            line, fault = line + data.count(b"\n", 0, error.start), "not valid UTF-8"
        case UnicodeEncodeError():
            fault = "a \\u escape is half of a surrogate pair, which is no text"
        case json.JSONDecodeError():
            line, column = line + error.lineno - 1, f", column {error.colno}"
            fault, detail = "not valid JSON", f" ({error.msg})"
        case RecursionError():
            fault = "nested too deeply"
        case _:  # a number of thousands of digits
            fault, detail = "not valid JSON", f" ({one_line(error)})"
    return RowError(f"{path}, line {line}{column}: {fault}{detail}", fault)


def _parquet_file(path: Path) -> Rows:
    """Reads from the row group on that holds the row asked for."""
    num_rows = _open_parquet(path).metadata.num_rows

    def read(start: int) -> Iterator[Row | RowError]:
        file, first, group = _open_parquet(path), 0, 0
        while group < file.num_row_groups and first + (size := file.metadata.row_group(group).num_rows) <= start:
            first, group = first + size, group + 1
        return _batch_rows(file.iter_batches(BLOCK, row_groups=range(group, file.num_row_groups)), path, start, first)

    return _rows(path, read, lambda: num_rows)


def _open_parquet(path: Path) -> "ParquetFile":
    from pyarrow.parquet import ParquetFile

    with _arrow_errors(path):
        return ParquetFile(path, pre_buffer=False)  # or whole row groups would be held


def _arrow_file(path: Path) -> Rows:
    """A memory-mapped file of one of Arrow's two formats, such as `datasets` writes to its cache and to disk."""
    import pyarrow

    with _arrow_errors(path):
        source = pyarrow.memory_map(str(path))
        is_file_format = source.read(6) == b"ARROW1"
        source.seek(0)
        table = (pyarrow.ipc.open_file if is_file_format else pyarrow.ipc.open_stream)(source).read_all()

    def batches() -> "Iterator[RecordBatch]":
        for batch in table.to_batches():
            batch.validate(full=True)  # or the offsets in a damaged file would be followed anywhere
            yield batch

    return _rows(path, lambda start: _batch_rows(batches(), path, start), lambda: len(table))


def _batch_rows(batches: "Iterator[RecordBatch]", path: Path, start: int, first: int = 0) -> Iterator[Row | RowError]:
    """The rows of batches from number `start` of the file on, where the first batch begins with number `first`."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import Table

    while True:
        with _arrow_errors(path):
            batch = next(batches, None)
            if batch is None:
                return
            # With a fingerprint, or it would be hashed from the whole table.
            part = Dataset(InMemoryTable(Table.from_batches([batch])), fingerprint="rows")
        yield from dataset_rows(part, str(path), max(0, start - first), first)
        first += len(batch)


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """What Arrow and `datasets` raise for a file that they cannot read, as a DataError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path}: not a readable {path.suffix[1:]} file: {one_line(error)}") from error
