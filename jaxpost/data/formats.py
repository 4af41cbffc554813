"""Rows from a JSON, JSONL or Parquet file, a folder of them or the Hugging Face Hub, and what type of rows they are."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from jaxpost.errors import DataError, one_line
from jaxpost.options import nearest, option

if TYPE_CHECKING:
    from datasets import Dataset

DatasetType = Literal["language_modeling", "prompt_completion", "prompt_only", "tokenized"]

SUFFIXES = (".json", ".jsonl", ".parquet")
ROLES = ("system", "developer", "user", "assistant", "tool")
IGNORE = -100  # the label of a token that is not trained on
BLOCK = 1000  # rows that are checked and tokenised at a time
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
SHARD = re.compile(r"-\d+(-of-\d+(-[0-9a-f]+)?)?$")  # train-00000-of-00002, train-00000-of-00002-a1b2c3, train-3
SPLIT_WORDS = ("train", "training", "validation", "valid", "val", "dev", "test", "eval")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which rows to read; the names are those of TRL's ScriptArguments."""

    dataset_name: str | None = option(None, "a .json, .jsonl or .parquet file, a folder of them, or a Hub id")
    dataset_config: str | None = option(None, "configuration of the dataset, where it has several")
    dataset_train_split: str = option("train", "split to train on")
    dataset_test_split: str = option("test", "split to evaluate on")


def load_rows(name_or_path: str, split: str, config_name: str | None = None) -> "Dataset":
    """Read one split of a dataset; what exists locally goes before a Hub id of the same name.

    A single local file is its own "train" split. In a folder (or in its `data/`) the split is the file's name:
    `train.jsonl`, `test.parquet`, `train-00000-of-00002.parquet`; where no name holds a usual split's, all files are
    "train". `config_name` is a sub-folder of a local folder.

    Raises:
        DataError: the path, the split, the file or a line of it (with its number, from 1) cannot be read.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        files = _files_by_split(path / config_name if config_name else path)
    elif not path.exists():
        return _load_from_hub(name_or_path, split, config_name)
    elif path.suffix.lower() in SUFFIXES:
        files = {"train": [path]}
    else:
        raise DataError(f"{path}: cannot read this kind of file; give one that ends in {', '.join(SUFFIXES)}")
    if split not in files:
        raise DataError(f"{path} has no split {split!r}{nearest(split, files)}; splits found: {', '.join(files)}")
    rows = _read_parquet(files[split]) if files[split][0].suffix.lower() == ".parquet" else _read_json(files[split])
    if len(rows) == 0:
        raise DataError(f"{path}: split {split!r} has no rows")
    return rows


def detect_type(
    columns: Sequence[str], first_row: Mapping[str, Any], text_field: str = "text", name: str = "the dataset"
) -> DatasetType:
    """The type of the rows, from the names of their columns; standard or conversational is told by the values.

    Where several fit, the order is: `input_ids`, `prompt` + `completion`, `messages`, `text_field`, `prompt`. The first
    row only chooses between `messages` and `text_field`, where a dataset has both and one of them is null.

    Raises:
        DataError: no accepted columns; lists those found and those accepted.
    """
    if "input_ids" in columns:
        return "tokenized"
    if "prompt" in columns and "completion" in columns:
        return "prompt_completion"
    if language_modeling_column(columns, first_row, text_field) is not None:
        return "language_modeling"
    if "prompt" in columns:
        return "prompt_only"
    raise DataError(
        f"{name} has the columns {', '.join(columns) or '(none)'}; accepted are 'messages', {text_field!r} (named by "
        "--dataset_text_field), 'prompt' with 'completion', 'prompt', or 'input_ids'"
    )


def language_modeling_column(columns: Sequence[str], first_row: Mapping[str, Any], text_field: str) -> str | None:
    """The column that holds the text or the messages of a language-modelling row; None if there is none."""
    found = [column for column in ("messages", text_field) if column in columns]
    filled = [column for column in found if first_row.get(column) is not None]
    return (filled or found or [None])[0]


def is_conversational(value: Any) -> bool:
    """Whether a cell holds messages (a list of dicts with a role) rather than text."""
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], Mapping) and "role" in value[0]


class Block(NamedTuple):
    """Consecutive rows as columns, each readable as one type; the wrong type is a DataError that names the row, from 1.

    Attributes:
        columns: the cells by column.
        first: number of the block's first row in the dataset, from 0.
        name: the dataset's name in messages.
    """

    columns: Mapping[str, list[Any]]
    first: int
    name: str

    def where(self, i: int, column: str) -> str:
        """The name of a cell in messages."""
        return f"{self.name}, row {self.first + i + 1}, column {column!r}"

    def texts(self, column: str) -> list[str]:
        """A column of text."""
        for i, value in enumerate(self.columns[column]):
            if not isinstance(value, str):
                raise DataError(f"{self.where(i, column)} must be text, not {_describe(value)}")
        return self.columns[column]

    def messages(self, column: str) -> list[list[dict[str, Any]]]:
        """A column of messages; keys that are null (as Arrow fills them in) are left out."""
        for i, value in enumerate(self.columns[column]):
            where = self.where(i, column)
            if not is_conversational(value):
                raise DataError(f"{where} must be a list of messages with role and content, not {_describe(value)}")
            for n, message in enumerate(value, start=1):
                role = message.get("role") if isinstance(message, Mapping) else None
                if role not in ROLES:
                    raise DataError(f"{where}: message {n} has the unknown role {role!r}; roles are {', '.join(ROLES)}")
                if not isinstance(message.get("content"), str):
                    found = _describe(message.get("content"))
                    raise DataError(f"{where}: the content of message {n} must be text, not {found}")
        return [[{k: v for k, v in m.items() if v is not None} for m in value] for value in self.columns[column]]

    def integers(self, column: str, i: int, below: int, length: int | None = None, ignore: int = 0) -> np.ndarray:
        """Row `i` of a column of ids, labels or masks as int64 [T]: 0 <= value < `below`, or `ignore`; T = `length`."""
        value, where = self.columns[column][i], self.where(i, column)
        if not isinstance(value, list) or not set(map(type, value)) <= {int, bool}:
            raise DataError(f"{where} must be a list of whole numbers, not {_describe(value)}")
        if length is not None and len(value) != length:
            raise DataError(f"{where} has {len(value)} values for {length} input_ids")
        values = np.array(value, np.int64)
        for t in np.flatnonzero(((values < 0) | (values >= below)) & (values != ignore))[:1]:
            raise DataError(f"{where}: {values[t]} at position {t} (from 0) is out of range 0..{below - 1}")
        return values

    def label_mask(self, i: int, ids: np.ndarray, below: int) -> np.ndarray:
        """Row `i` of `labels` as bool [T]: which of its tokens `ids` are trained, all but those labelled IGNORE."""
        labels = self.integers("labels", i, below, len(ids), IGNORE)
        mask = labels != IGNORE
        for t in np.flatnonzero(mask[1:] & (labels[1:] != ids[1:]))[:1] + 1:
            found = f"{self.where(i, 'labels')}: {labels[t]} at position {t} (from 0), where the token is {ids[t]}"
            raise DataError(f"{found}; a label is its own token, not the next one, or {IGNORE}")
        return mask


def blocks(rows: "Dataset | Sequence[Mapping[str, Any]]", name: str) -> Iterator[Block]:
    """The rows in order, BLOCK at a time."""
    if len(rows) == 0:
        raise DataError(f"{name} has no rows")
    if isinstance(rows, Sequence):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        for start in range(0, len(rows), BLOCK):
            yield Block({c: [row.get(c) for row in rows[start : start + BLOCK]] for c in columns}, start, name)
        return
    plain = rows.with_format(None)
    for start in range(0, len(plain), BLOCK):
        yield Block(plain[start : start + BLOCK], start, name)


def _describe(value: Any) -> str:
    if value is None:
        return "null or missing"
    return "an empty list" if value == [] else f"{type(value).__name__} {value!r}"[:60]


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder, by split, in the order of their names."""
    if not folder.is_dir():
        found = ", ".join(sorted(p.name for p in folder.parent.iterdir() if p.is_dir())) or "none"
        raise DataError(f"{folder.parent} has no configuration {folder.name!r}; sub-folders found: {found}")
    files: dict[str, list[Path]] = {}
    for parent in (folder, folder / "data"):
        if parent.is_dir() and not files:
            for path in sorted(p for p in parent.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES):
                files.setdefault(SHARD.sub("", path.stem), []).append(path)
    if not files:
        raise DataError(f"{folder} has no {', '.join(SUFFIXES)} file, nor has its data/ folder")
    if not {word for split in files for word in re.split(r"[^A-Za-z]+", split)} & set(SPLIT_WORDS):
        files = {"train": sorted(path for paths in files.values() for path in paths)}
    for split, paths in files.items():
        if len({path.suffix.lower() == ".parquet" for path in paths}) > 1:
            raise DataError(f"{folder}: split {split!r} is in JSON and in Parquet files; keep one kind")
    return files


def _read_json(paths: list[Path]) -> "Dataset":
    """Rows of JSON-lines files or of JSON files that hold one array of objects."""
    from datasets import Dataset
    from pyarrow import ArrowException

    rows = [row for path in paths for row in _parse_json(path)]
    columns = dict.fromkeys(key for row in rows for key in row)
    try:
        # A column of mixed types stays as it was written; Block names the row, if the column is used at all.
        return Dataset.from_dict({c: [row.get(c) for row in rows] for c in columns}, on_mixed_types="use_json")
    except (ArrowException, OverflowError) as error:
        raise DataError(f"{paths[0]}: the rows do not fit in a table: {one_line(error)}") from error


def _parse_json(path: Path) -> list[dict[str, Any]]:
    """The objects in one JSON or JSON-lines file; blank lines are skipped."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error
    if not data.strip():
        raise DataError(f"{path} is empty")
    if path.suffix.lower() == ".json" and data.lstrip().startswith(b"["):
        unit, numbered = "row", list(enumerate(_parse_value(data, path, 1), start=1))
    else:
        lines = enumerate(data.split(b"\n"), start=1)
        unit, numbered = "line", [(n, _parse_value(line, path, n)) for n, line in lines if line.strip()]
    for n, row in numbered:
        if not isinstance(row, dict):
            raise DataError(f"{path}, {unit} {n}: a row must be a JSON object, not {_describe(row)}")
    return [row for _, row in numbered]


def _parse_value(data: bytes, path: Path, line: int) -> Any:
    """The JSON value in `data`, which starts at line number `line` of the file."""
    try:
        value = json.loads(data.decode("utf-8"))
        if b"\\u" in data:  # half of a surrogate pair is legal in JSON, but it is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(f"{path}, line {line}: not valid UTF-8; save the file as UTF-8") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{path}, line {line}: a \\u escape is half of a surrogate pair, which is no text") from error
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        raise DataError(f"{path}, {where}: not valid JSON ({error.msg})") from error
    except RecursionError as error:
        raise DataError(f"{path}, line {line}: nested too deeply") from error
    return value


def _read_parquet(paths: list[Path]) -> "Dataset":
    """Rows of Parquet files with one schema."""
    import pyarrow.parquet
    from datasets import Dataset, concatenate_datasets
    from datasets.table import InMemoryTable

    parts = []
    for path in paths:
        try:
            parts.append(Dataset(InMemoryTable(pyarrow.parquet.ParquetFile(path).read())))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file: {one_line(error)}") from error
    try:
        return concatenate_datasets(parts)
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{paths[0].parent}: the Parquet files differ in their columns: {one_line(error)}") from error


def _load_from_hub(name: str, split: str, config_name: str | None) -> "Dataset":
    """One split of a dataset on the Hub (or in its local cache)."""
    if Path(name).suffix.lower() in SUFFIXES or not HUB_ID.fullmatch(name):
        raise DataError(f"{name}: no such file or folder, and it does not look like a Hub id (owner/name)")
    import datasets

    try:
        rows = datasets.load_dataset(name, config_name, split=split)
    # Whatever goes wrong between here and the Hub (network, rights, a missing split, a broken file) is about the data.
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"{name}: no such local path, and the Hub did not give split {split!r} ({reason})") from error
    if len(rows) == 0:
        raise DataError(f"{name}: split {split!r} has no rows")
    return rows
