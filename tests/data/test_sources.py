"""Paths, folders, globs and names on the Hub to rows."""

from pathlib import Path

import datasets
import pytest

from jaxpost.data.sources import DatasetConfig, load_rows
from jaxpost.errors import ConfigError, DataError
from tests.data.test_files import write


def load(path, split="train", *args, **options):
    return list(load_rows(str(path), split, *args, **options))


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    for n in (1, 0):
        write(tmp_path / "data" / f"train-0000{n}-of-00002.parquet", [{"n": n}])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", [{"n": 7}])
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert load(tmp_path) == [{"n": 0}, {"n": 1}] and load(tmp_path, "test") == [{"n": 7}]
    rows = load_rows(str(tmp_path), "train")
    assert rows.name == f"{tmp_path} (train)"
    assert next(rows(1)).place == f"{tmp_path}/data/train-00001-of-00002.parquet, row 1"


def test_splits_are_told_by_the_names_of_files(tmp_path):
    write(tmp_path / "a" / "train.jsonl", [{"n": 1}])
    write(tmp_path / "a" / "test.parquet", [{"n": 2}])
    assert load(tmp_path / "a") == [{"n": 1}] and load(tmp_path / "a", "test") == [{"n": 2}]
    write(tmp_path / "b" / "0001.arrow", [{"n": 1}])
    write(tmp_path / "b" / "0000.arrow", [{"n": 2}])
    (tmp_path / "b" / "._0000.arrow").write_text("what a Mac leaves behind")
    assert load(tmp_path / "b") == [{"n": 2}, {"n": 1}]
    write(tmp_path / "c" / "maths-train.jsonl", [{"n": 1}])
    write(tmp_path / "c" / "maths-test.jsonl", [{"n": 2}])
    with pytest.raises(DataError, match=r"no split 'train'.*splits found: maths-test, maths-train"):
        load(tmp_path / "c")
    assert load(tmp_path / "c", "maths-train") == [{"n": 1}]
    write(tmp_path / "a" / "train.parquet", [{"n": 1}])
    with pytest.raises(DataError, match=r"split 'train' is in .json and in .parquet files; keep one kind"):
        load(tmp_path / "a")


def test_saved_datasets(tmp_path):
    rows = [{"n": n} for n in range(5)]
    table = datasets.Dataset.from_list(rows)
    table.select([3, 1]).save_to_disk(tmp_path / "one")
    assert load(tmp_path / "one") == [rows[3], rows[1]]
    datasets.DatasetDict(train=table, test=table.select([2])).save_to_disk(tmp_path / "several")
    assert load(tmp_path / "several") == rows and load(tmp_path / "several", "test") == [rows[2]]
    with pytest.raises(DataError, match="no split 'dev'; splits found: test, train"):
        load(tmp_path / "several", "dev")


def test_globs(tmp_path, monkeypatch):
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        write(tmp_path / "deep" / name, [{"name": name}])
    (tmp_path / "deep" / "README.md").write_text("not data")
    assert load(tmp_path / "deep" / "train-*.jsonl") == [{"name": "train-0.jsonl"}, {"name": "train-1.jsonl"}]
    assert load(tmp_path / "**" / "*", "test") == [{"name": "test.jsonl"}]
    assert load(tmp_path / "deep" / "t[er]*", "test") == [{"name": "test.jsonl"}]
    write(tmp_path / "odd[1].jsonl", [{"name": "a file"}])
    assert load(tmp_path / "odd[1].jsonl") == [{"name": "a file"}]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/deep/test*.jsonl", "test") == [{"name": "test.jsonl"}]
    with pytest.raises(DataError, match=r"none-\*.jsonl: no such file that ends in .json"):
        load(tmp_path / "none-*.jsonl")


def test_sub_folders_and_listed_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "main" / "train.jsonl", [{"n": 1}])
    write(tmp_path / "main" / "more.jsonl", [{"n": 2}])
    assert load(tmp_path, "train", "main") == load(tmp_path, data_dir="main") == [{"n": 1}]
    with pytest.raises(DataError, match="has no folder 'socratic'; found: main"):
        load(tmp_path, "train", "socratic")
    assert load(tmp_path, data_files="main/*.jsonl") == [{"n": 2}, {"n": 1}]
    assert load(tmp_path, data_dir="main", data_files=["train.jsonl", "more.jsonl"]) == [{"n": 1}, {"n": 2}]
    splits = {"train": "main/train.jsonl", "test": ["main/more.jsonl"]}
    assert load(tmp_path, "test", data_files=splits) == [{"n": 2}]
    assert load("json", data_files=str(tmp_path / "main" / "t*.jsonl")) == [{"n": 1}]
    assert load("json", data_files="~/main/t*.jsonl") == [{"n": 1}]
    write(tmp_path / "odd[1].jsonl", [{"n": 3}])
    assert load(tmp_path, data_files="odd[1].jsonl") == [{"n": 3}]
    with pytest.raises(DataError, match="parquet is a kind of file, and data_files does not say which"):
        load("parquet")
    with pytest.raises(DataError, match="no split 'dev'"):
        load(tmp_path, "dev", data_files=splits)


def test_a_path_that_cannot_be_read_says_what_can(tmp_path):
    with pytest.raises(DataError, match=r"has no .json, .jsonl, .parquet, .arrow file, nor has its data/ folder"):
        load(tmp_path)
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(DataError, match=r"a.csv: cannot read this kind of file; give one that ends in .json"):
        load(tmp_path / "a.csv")
    path = write(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="has no split 'test'; splits found: train"):
        load(path, "test")


HUB_NAMES = ["./nowhere/rows", "no/such/file", "rows.jsonl", "owner/rows.parquet", "a.arrow", "~/rows here"]


@pytest.mark.parametrize("name", HUB_NAMES)
def test_what_is_no_path_and_no_hub_id_says_so(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match="no such file or folder, and it does not look like a Hub id"):
        load(name)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    expected = r"owner/name: no such local path, .*'train' \(ConnectionError: Couldn't reach it and more\)"
    with pytest.raises(DataError, match=expected):
        load("owner/name")


def test_a_hub_id_is_loaded_whole_or_as_a_stream(monkeypatch):
    asked, table = [], datasets.Dataset.from_list([{"n": n} for n in range(3)])

    def fake(*args, **kwargs):
        asked.append((args, kwargs))
        return table.to_iterable_dataset() if kwargs.get("streaming") else table

    monkeypatch.setattr(datasets, "load_dataset", fake)
    rows = load_rows("owner/name", "train", "main")
    assert rows["n"] == [0, 1, 2] and next(rows(2)).place == "owner/name (train), row 3" and rows.size == 3
    stream = load_rows("owner/name", "test", streaming=True, data_files="x.parquet", data_dir="d")
    assert [row.cells["n"] for row in stream(1)] == [1, 2] and stream.size is None
    options = {"split": "test", "streaming": True, "data_files": "x.parquet", "data_dir": "d"}
    assert asked == [(("owner/name", "main"), {"split": "train"}), (("owner/name", None), options)]


def test_a_folder_goes_before_a_hub_id(tmp_path, monkeypatch):
    write(tmp_path / "owner" / "name" / "train.jsonl", [{"n": 1}])
    monkeypatch.chdir(tmp_path)
    assert load("owner/name") == [{"n": 1}]
    assert load(Path("owner/name/train.jsonl")) == [{"n": 1}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_row": "skp"}, r"on_bad_row is 'skp' \(did you mean 'skip'\?\)"),
        ({"dataset_name": "a", "datasets": [{"path": "b"}]}, "dataset_name and datasets are both given"),
        *(({"test_split_size": size}, "test_split_size is .*; it must be a share") for size in (0, -1, 1.5, 1e400)),
    ],
)
def test_a_config_that_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DatasetConfig(**options)
