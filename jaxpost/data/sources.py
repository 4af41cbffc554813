"""Where rows come from: files, folders and globs of them, and the Hugging Face Hub."""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpost.data.files import SUFFIXES, read_file
from jaxpost.data.rows import Rows, as_rows, join
from jaxpost.errors import ConfigError, DataError, one_line
from jaxpost.options import Group, check_choices, nearest, option

DataFiles = str | Sequence[str] | Mapping[str, Any]

FORMATS = ("json", "parquet", "arrow")  # what `path` may be, as in datasets.load_dataset, where data_files has the rest
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what `datasets` notes
ON_BAD_ROW = ("error", "skip")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
SHARD = re.compile(r"-\d+(-of-\d+(-[0-9a-f]+)?)?$")  # train-00000-of-00002, train-00000-of-00002-a1b2c3, train-3
SPLIT_WORDS = ("train", "training", "validation", "valid", "val", "dev", "test", "eval")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which rows to read; the names are those of TRL's ScriptArguments and DatasetMixtureConfig."""

    help_group = Group.DATA

    dataset_name: str | None = option(
        None,
        "A .json, .jsonl, .parquet or .arrow file, a folder or glob of them, or a Hub id.",
        may_change=True,
    )
    dataset_config: str | None = option(None, "Configuration of the dataset, where it has several.", may_change=True)
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on.", may_change=True)
    dataset_streaming: bool = option(False, "Read rows as they are needed and never all of them; needs max_steps.")
    datasets: list[dict] = option(
        [], "A mixture in place of dataset_name: path, name, data_dir, data_files, split, columns, fraction or weight."
    )
    test_split_size: float | None = option(
        None,
        "Training rows to hold out for evaluation, in place of a test split: a share below 1, or a number of rows.",
    )
    on_bad_row: str = option(
        "error", "What becomes of a row that cannot be used: error, or skip (it is counted).", choices=ON_BAD_ROW
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.datasets and self.dataset_name is not None:
            raise ConfigError("dataset_name and datasets are both given; keep one of them")
        size = self.test_split_size
        if size is not None and not (0 < size < 1 or (size >= 1 and float(size).is_integer())):
            raise ConfigError(f"test_split_size is {size}; it must be a share between 0 and 1, or a number of rows")


def load_rows(
    name_or_path: str,
    split: str,
    config_name: str | None = None,
    *,
    streaming: bool = False,
    data_dir: str | None = None,
    data_files: DataFiles | None = None,
) -> Rows:
    """One split of a dataset; what exists locally goes before a Hub id of the same name.

    A single local file is its own "train" split. In a folder (or in its `data/`) and in a glob the split is the file's
    name: `train.jsonl`, `test.parquet`, `train-00000-of-00002.parquet`; where no name holds a usual split's, all files
    are "train". A folder of `save_to_disk` is read as it is.

    Args:
        name_or_path: a file, folder, glob or Hub id; or json, parquet or arrow, where `data_files` names the files.
        split: its name.
        config_name: of a dataset on the Hub that has several; for a local folder, a sub-folder.
        streaming: download a dataset of the Hub as it is read; local files are always read so.
        data_dir: a folder in the dataset.
        data_files: files or globs in the dataset, or those of each split.

    Raises:
        DataError: the path, the split or a file cannot be read. What is wrong in a file shows when it is read.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir() or (name_or_path in FORMATS and not path.exists()):
        if not path.is_dir() and data_files is None:
            raise DataError(f"{path} is a kind of file, and data_files does not say which files to read")
        root = path if path.is_dir() else Path()
        folder = root / (config_name or "") / (data_dir or "")
        if not folder.is_dir():
            raise DataError(f"{folder.parent} has no folder {folder.name!r}; found: {_sub_folders(folder.parent)}")
        files = _files_in_folder(folder) if data_files is None else _listed_files(folder, data_files)
    elif path.is_file():
        if config_name is not None:
            raise DataError(f"{path} is one file, which has no configuration {config_name!r}; leave dataset_config out")
        files = {"train": [path]}
    elif glob.has_magic(name_or_path):
        files = _by_split(_matches(path), str(path))
    else:
        return _load_from_hub(name_or_path, split, config_name, streaming, data_dir, data_files)
    if split not in files:
        raise DataError(f"{path} has no split {split!r}{nearest(split, files)}; splits found: {', '.join(files)}")
    parts = [read_file(file) for file in files[split]]
    return parts[0] if len(parts) == 1 else join(parts, f"{path} ({split})")


def _sub_folders(folder: Path) -> str:
    found = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    return ", ".join(found) or "none"


def _files_in_folder(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder, or of its data/, by split; those of a saved DatasetDict lie in a folder each."""
    if (folder / "dataset_dict.json").exists():
        return {sub.name: _data_files(sub) for sub in sorted(folder.iterdir()) if sub.is_dir()}
    paths = _data_files(folder) or _data_files(folder / "data")
    if not paths:
        raise DataError(f"{folder} has no {', '.join(SUFFIXES)} file, nor has its data/ folder")
    return _by_split(paths, str(folder))


def _data_files(folder: Path) -> list[Path]:
    return sorted(filter(_is_data, folder.iterdir())) if folder.is_dir() else []


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.name not in NO_DATA and path.name[0] != "." and path.is_file()


def _listed_files(folder: Path, data_files: DataFiles) -> dict[str, list[Path]]:
    """The files that are listed for each split; a list without splits is "train"."""
    listed = data_files if isinstance(data_files, Mapping) else {"train": data_files}
    patterns = {split: [names] if isinstance(names, str) else names for split, names in listed.items()}
    return {split: [file for name in names for file in _matches(folder / name)] for split, names in patterns.items()}


def _matches(pattern: Path) -> list[Path]:
    """The file of that name, or the data files that a glob matches, in the order of their names."""
    pattern = pattern.expanduser()
    found = map(Path, sorted(glob.glob(str(pattern), recursive=True)))
    files = [pattern] if pattern.is_file() else list(filter(_is_data, found))
    if not files:
        raise DataError(f"{pattern}: no such file that ends in {', '.join(SUFFIXES)}")
    return files


def _by_split(paths: list[Path], name: str) -> dict[str, list[Path]]:
    """Files by the split that their names tell."""
    files: dict[str, list[Path]] = {}
    for path in paths:
        files.setdefault(SHARD.sub("", path.stem), []).append(path)
    if not {word for split in files for word in re.split(r"[^A-Za-z]+", split)} & set(SPLIT_WORDS):
        files = {"train": paths}
    for split, found in files.items():
        kinds = sorted({path.suffix.lower().replace("jsonl", "json") for path in found})
        if len(kinds) > 1:
            raise DataError(f"{name}: split {split!r} is in {' and in '.join(kinds)} files; keep one kind")
    return files


def _load_from_hub(
    name: str,
    split: str,
    config_name: str | None,
    streaming: bool,
    data_dir: str | None,
    data_files: DataFiles | None,
) -> Rows:
    """One split of a dataset on the Hub (or in its local cache)."""
    if Path(name).suffix.lower() in SUFFIXES or not HUB_ID.fullmatch(name):
        raise DataError(f"{name}: no such file or folder, and it does not look like a Hub id (owner/name)")
    import datasets

    wanted = {"data_dir": data_dir, "data_files": data_files, "streaming": streaming or None}
    options: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
    try:
        found = datasets.load_dataset(name, config_name, split=split, **options)
    # Whatever goes wrong between here and the Hub (network, rights, a missing split, a broken file) is about the data.
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"{name}: no such local path, and the Hub did not give split {split!r} ({reason})") from error
    return as_rows(found, f"{name} ({split})")
