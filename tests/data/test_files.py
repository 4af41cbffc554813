"""JSON, JSONL, Parquet and Arrow files to rows, whole and broken."""

import json
import tracemalloc

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxpost.data.bad_rows import BadRows
from jaxpost.data.files import read_file
from jaxpost.data.formats import blocks
from jaxpost.data.rows import RowError
from jaxpost.errors import DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path, rows):
    """Rows as the kind of file that the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=700)
        case ".arrow":
            with pyarrow.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table, 300)
    return path


KINDS = (".jsonl", ".json", ".parquet", ".arrow")


@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_of_file_is_read_from_any_row_on(suffix, tmp_path):
    path = write(tmp_path / f"a{suffix}", [{"n": n, "messages": CHAT} for n in range(2500)])
    rows = read_file(path)
    assert len(rows) == 2500 and rows.column_names == ["n", "messages"]
    for start in (0, 1, 699, 700, 1000, 1699, 2499, 2500, 0):
        found = list(rows(start))
        assert [row.cells["n"] for row in found] == list(range(start, 2500))
        assert [row.place for row in found[:1]] == [f"{path}, row {start + 1}"] * (start < 2500)
    assert rows["messages"][1] == CHAT


@pytest.mark.parametrize("suffix", KINDS)
def test_dicts_keep_the_keys_that_they_were_written_with(suffix, tmp_path):
    rows = [
        {"m": [{"role": "user", "content": "☕ \u2028 naïve"}, {"role": "assistant", "calls": [{"a": 1}, {"b": 2}]}]}
    ]
    assert list(read_file(write(tmp_path / f"a{suffix}", rows))) == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_reading_holds_no_more_than_a_block(suffix, tmp_path):
    path = write(tmp_path / f"a{suffix}", [{"text": f"{n:02000}"} for n in range(10_000)])
    tracemalloc.start()
    before = pyarrow.total_allocated_bytes()
    rows = read_file(path)
    held = [pyarrow.total_allocated_bytes() - before for n, _ in enumerate(rows()) if n % 100 == 0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(held) == 100 and max(held) + peak < 8_000_000


def test_arrow_files_of_both_formats(tmp_path):
    rows = [{"n": n} for n in range(5)]
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", pyarrow.schema([("n", pyarrow.int64())])) as file:
        file.write_table(pyarrow.Table.from_pylist(rows))
    assert list(read_file(tmp_path / "a.arrow")) == rows


def test_cells_that_are_stored_as_json_are_read_as_what_they_say(tmp_path):
    rows = [{"tools": [{"name": "a", "default": None}]}, {"tools": [{"name": 3}]}]
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(tmp_path / "a.parquet")
    assert list(read_file(tmp_path / "a.parquet")) == rows


def test_blank_lines_a_byte_order_mark_and_windows_ends_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\r\n  \n{"text": "2020-01-01"}')
    rows = read_file(tmp_path / "a.jsonl")
    assert rows["text"] == ["x", "2020-01-01"] and len(rows) == 2
    assert [row.place.split(", ")[1] for row in rows()] == ["row 1", "row 2 (line 4)"]
    assert next(rows(1)).place.endswith("row 2 (line 4)")


def test_json_is_an_array_or_lines(tmp_path):
    (tmp_path / "a.json").write_text('\n[\n {"text": "x"},\n {"text": "y", "n": 1}\n]\n')
    assert list(read_file(tmp_path / "a.json")) == [{"text": "x"}, {"text": "y", "n": 1}]
    (tmp_path / "b.json").write_text('{"text": "z"}\n{"text": 1}\n')
    assert list(read_file(tmp_path / "b.json")) == [{"text": "z"}, {"text": 1}]


BAD_LINES = [
    (b'{"text": "y"', r"line 2, column \d+: not valid JSON \(Expecting"),
    (b'{"text": "\xff"}', "line 2: not valid UTF-8"),
    (b'{"text": "\\ud800"}', "line 2: a .u escape is half of a surrogate pair"),
    (b'["y"]', r"row 2: a row must be an object with columns, not list \['y'\]"),
    (b"[" * 100_000, "line 2: nested too deeply"),
    (b'{"text": ' + b"9" * 5000 + b"}", r"line 2: not valid JSON \(Exceeds the limit"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_or_left_out(line, message, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "x"}\n' + line + b'\n{"text": "\\ud83d\\ude00"}\n')
    rows = read_file(tmp_path / "bad.jsonl")
    with pytest.raises(RowError, match=f"bad.jsonl, {message}") as caught:
        list(blocks(rows, "d"))
    assert "\n" not in str(caught.value)
    bad_rows = BadRows("skip")
    [block] = blocks(rows, "d", bad_rows)
    assert block.texts("text") == ["x", "😀"] and block.place(1).endswith("row 3")
    assert bad_rows.counts.total() == 1 and len(rows) == 3 and rows.column_names == ["text"]


def test_errors_in_a_json_array_are_placed(tmp_path):
    for content, message in (
        (b'[\n {"text": "x"},\n {"text" "y"}\n]', r"a.json, line 3, column \d+: not valid JSON"),
        (b'[\n {"text": "x"},\n {"text": "\xff"}\n]', "a.json, line 3: not valid UTF-8"),
        (b'[{"text": "x"}, 3]', "a.json, row 2: a row must be an object with columns, not int 3"),
        (b"[]", "d has no rows"),
    ):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(blocks(read_file(tmp_path / "a.json"), "d"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_an_empty_file_says_so(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is empty"):
        list(blocks(read_file(tmp_path / name), "d"))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_broken_binary_file_is_one_line(suffix, tmp_path):
    path = write(tmp_path / f"a{suffix}", [{"text": f"{n:50}"} for n in range(3000)])
    whole = path.read_bytes()
    for content in (b"", b"no table at all", whole[:200], whole[: len(whole) // 2], b"\0" * 5000 + whole[5000:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"a{suffix}: (not a readable|its columns)") as caught:
            list(read_file(path)())
        assert "\n" not in str(caught.value)


def test_an_arrow_file_that_points_outside_of_itself_is_refused(tmp_path):
    path = write(tmp_path / "a.arrow", [{"text": "abc"}] * 9)
    offsets = np.arange(0, 28, 3, np.int32)
    damaged = np.where(offsets == 12, 1 << 30, offsets).astype(np.int32)
    assert offsets.tobytes() in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(offsets.tobytes(), damaged.tobytes()))
    with pytest.raises(DataError, match=r"a.arrow: not a readable arrow file: .*offset"):
        list(read_file(path)())


def test_invalid_utf8_in_a_binary_file_is_one_bad_row(tmp_path):
    texts = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    bad_rows = BadRows("skip")
    [block] = blocks(read_file(tmp_path / "a.parquet"), "d", bad_rows)
    assert block.texts("text") == ["a", "c"] and str(bad_rows) == "1 rows skipped: 1 x not valid UTF-8"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_cell_of_50_megabytes_is_refused_by_its_reader(suffix, tmp_path):
    path = write(tmp_path / f"a{suffix}", [{"text": "x"}, {"text": "y" * 50_000_000}, {"text": "z"}])
    bad_rows = BadRows("skip")
    [block] = blocks(read_file(path), "d", bad_rows)
    found = bad_rows.attempt(block, lambda block: block.texts("text"))
    assert [texts for _, texts in found] == [["x"], ["z"]]
    with pytest.raises(RowError, match="row 2, column 'text' has more than 10,000,000 characters: 50,000,000"):
        block.texts("text")
