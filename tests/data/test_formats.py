"""Files, folders and the Hub to rows; and the type of the rows."""

import json

import datasets
import pytest

from jaxpost.data.chat import SFTDataConfig, encode_rows
from jaxpost.data.formats import Block, blocks, detect_type, is_conversational, load_rows
from jaxpost.errors import DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_jsonl_rows_keep_their_values_and_order(tmp_path):
    rows = [{"messages": CHAT}, {"messages": [{"role": "user", "content": "☕ \u2028 naïve"}]}]
    assert load_rows(str(write(tmp_path / "a.jsonl", rows)), "train").to_list() == rows


def test_blank_lines_a_byte_order_mark_and_windows_ends_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\r\n  \n{"text": "2020-01-01"}')
    assert load_rows(str(tmp_path / "a.jsonl"), "train")["text"][:] == ["x", "2020-01-01"]


def test_json_is_an_array_or_lines(tmp_path):
    (tmp_path / "a.json").write_text('[\n {"text": "x"},\n {"text": "y", "n": 1}\n]\n')
    assert load_rows(str(tmp_path / "a.json"), "train").to_list() == [{"text": "x", "n": None}, {"text": "y", "n": 1}]
    write(tmp_path / "b.json", [{"text": "z"}])
    assert load_rows(str(tmp_path / "b.json"), "train")["text"][:] == ["z"]


def test_a_column_that_first_appears_later_is_kept(tmp_path):
    rows = load_rows(str(write(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y", "extra": "z"}])), "train")
    assert rows["extra"][:] == [None, "z"]


def test_mixed_types_in_a_column_are_kept_as_written(tmp_path):
    rows = [{"text": "x", "answer": 1}, {"text": "y", "answer": "two"}]
    assert load_rows(str(write(tmp_path / "a.jsonl", rows)), "train").to_list() == rows


def test_parquet_shards_are_read_in_the_order_of_their_names(tmp_path):
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [{"messages": CHAT[1:]}])
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [{"messages": CHAT[:1]}])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [{"messages": CHAT}])
    assert load_rows(str(tmp_path), "train")["messages"][:] == [CHAT[:1], CHAT[1:]]
    assert load_rows(str(tmp_path), "test")["messages"][:] == [CHAT]


def test_a_folder_has_a_split_for_each_file_name(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "a"}])
    write(tmp_path / "test.jsonl", [{"text": "b"}])
    assert load_rows(str(tmp_path), "train")["text"][:] == ["a"]
    assert load_rows(str(tmp_path), "test")["text"][:] == ["b"]


def test_files_without_a_split_in_their_names_are_all_train(tmp_path):
    write_parquet(tmp_path / "0000.parquet", [{"text": "a"}])
    write_parquet(tmp_path / "0001.parquet", [{"text": "b"}])
    assert load_rows(str(tmp_path), "train")["text"][:] == ["a", "b"]


def test_test_rows_under_an_unusual_name_never_become_train(tmp_path):
    write(tmp_path / "maths-train.jsonl", [{"text": "a"}])
    write(tmp_path / "maths-test.jsonl", [{"text": "b"}])
    with pytest.raises(DataError, match=r"no split 'train'.*splits found: maths-test, maths-train"):
        load_rows(str(tmp_path), "train")
    assert load_rows(str(tmp_path), "maths-train")["text"][:] == ["a"]


def test_a_configuration_is_a_subfolder(tmp_path):
    write(tmp_path / "main" / "train.jsonl", [{"text": "a"}])
    assert load_rows(str(tmp_path), "train", "main")["text"][:] == ["a"]
    with pytest.raises(DataError, match="no configuration 'socratic'; sub-folders found: main"):
        load_rows(str(tmp_path), "train", "socratic")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "x"}\n{"text": "y"\n{"text": "z"}\n', r"bad.jsonl, line 2, column \d+: not valid JSON"),
        (b'{"text": "x"}\n\n\n{"text": "\xff"}\n', "bad.jsonl, line 4: not valid UTF-8"),
        (b'{"text": "x"}\n{"text": "\\ud800"}\n', "bad.jsonl, line 2: .*surrogate"),
        (b'{"text": "x"}\n["y"]\n', "bad.jsonl, line 2: a row must be a JSON object, not list"),
        (b'{"text": "x"}\n' + b"[" * 100_000 + b"\n", "bad.jsonl, line 2: nested too deeply"),
        (b"", "bad.jsonl is empty"),
        (b" \n\n", "bad.jsonl is empty"),
    ],
)
def test_a_bad_file_is_reported_with_its_line(content, message, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(str(tmp_path / "bad.jsonl"), "train")
    assert "\n" not in str(caught.value)


def test_errors_in_a_json_array_are_placed(tmp_path):
    (tmp_path / "a.json").write_text('[\n {"text": "x"},\n {"text" "y"}\n]')
    with pytest.raises(DataError, match=r"a.json, line 3, column \d+: not valid JSON"):
        load_rows(str(tmp_path / "a.json"), "train")
    (tmp_path / "b.json").write_bytes(b'[\n {"text": "x"},\n {"text": "\xff"}\n]')
    with pytest.raises(DataError, match=r"b.json, line 3: not valid UTF-8"):
        load_rows(str(tmp_path / "b.json"), "train")
    (tmp_path / "c.json").write_text('[{"text": "x"}, 3]')
    with pytest.raises(DataError, match=r"c.json, row 2: a row must be a JSON object, not int 3"):
        load_rows(str(tmp_path / "c.json"), "train")
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(DataError, match="split 'train' has no rows"):
        load_rows(str(tmp_path / "d.json"), "train")


def test_a_bad_parquet_file_is_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match=r"a.parquet: not a readable Parquet file") as caught:
        load_rows(str(tmp_path / "a.parquet"), "train")
    assert "\n" not in str(caught.value)


def test_parquet_files_of_different_columns_are_refused(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [{"text": "a"}])
    write_parquet(tmp_path / "train-1.parquet", [{"text": 1}])
    with pytest.raises(DataError, match="differ in their columns"):
        load_rows(str(tmp_path), "train")


def test_a_missing_split_lists_those_found(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="has no split 'test'; splits found: train"):
        load_rows(str(path), "test")


def test_a_folder_or_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no .json, .jsonl, .parquet file"):
        load_rows(str(tmp_path), "train")
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(DataError, match=r"a.csv: cannot read this kind of file; give one that ends in .json"):
        load_rows(str(tmp_path / "a.csv"), "train")


@pytest.mark.parametrize("name", ["./nowhere/rows", "no/such/file", "rows.jsonl", "owner/rows.parquet", "~/rows here"])
def test_what_is_no_path_and_no_hub_id_says_so(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match="no such file or folder, and it does not look like a Hub id"):
        load_rows(name, "train")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"owner/name: no such local path, .*ConnectionError: Couldn't reach it and more"
    ):
        load_rows("owner/name", "train")


def test_a_hub_id_is_loaded_with_its_configuration(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"text": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows("owner/name", "train", "main")["text"][:] == ["x"]
    assert asked == [(("owner/name", "main"), {"split": "train"})]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "x"}, "language_modeling"),
        ({"messages": CHAT}, "language_modeling"),
        ({"prompt": "x", "messages": CHAT}, "language_modeling"),
        ({"prompt": "x", "completion": "y", "text": "z"}, "prompt_completion"),
        ({"prompt": CHAT, "answer": "4"}, "prompt_only"),
        ({"input_ids": [1], "text": "x"}, "tokenized"),
    ],
)
def test_detect_type(row, expected):
    assert detect_type(list(row), row) == expected


def test_detect_type_with_a_custom_field_and_without_any():
    assert detect_type(["body"], {"body": "x"}, text_field="body") == "language_modeling"
    with pytest.raises(
        DataError, match=r"rows.jsonl has the columns body, id; accepted are 'messages', 'text' .*'prompt'"
    ):
        detect_type(["body", "id"], {"body": "x", "id": 1}, name="rows.jsonl")


def test_is_conversational():
    assert is_conversational(CHAT)
    for value in ("text", [], None, ["text"], [{"from": "human", "value": "x"}]):
        assert not is_conversational(value)


def test_blocks_cover_lists_and_datasets_alike():
    rows = [{"text": str(i), **({"n": i} if i else {})} for i in range(2500)]
    for source in (rows, datasets.Dataset.from_list([{"text": r["text"], "n": r.get("n")} for r in rows])):
        found = list(blocks(source, "rows"))
        assert [block.first for block in found] == [0, 1000, 2000]
        assert [text for block in found for text in block.texts("text")] == [row["text"] for row in rows]
        assert found[0].columns["n"][:2] == [None, 1]
        assert found[2].where(3, "n") == "rows, row 2004, column 'n'"
    with pytest.raises(DataError, match="rows has no rows"):
        next(blocks([], "rows"))


def test_null_keys_of_messages_are_left_out():
    block = Block({"m": [[{"role": "user", "content": "x", "name": None, "n": 0}]]}, 0, "rows")
    assert block.messages("m") == [[{"role": "user", "content": "x", "n": 0}]]


IDS = {"input_ids": [5, 6]}
LABELLED = {"input_ids": [5, 6], "labels": [5, 6]}
TEXT = {"text": "ab"}
MESSAGES = {"messages": CHAT}
PAIR = {"prompt": "a", "completion": "b"}
CHAT_PAIR = {"prompt": CHAT[:1], "completion": CHAT[1:]}


@pytest.mark.parametrize(
    ("good", "column", "bad", "message"),
    [
        (IDS, "input_ids", [5, 999], ": 999 at position 1 .from 0. is out of range 0..258"),
        (IDS, "input_ids", [5, -1], ": -1 at position 1"),
        (IDS, "input_ids", [5, 6.5], " must be a list of whole numbers"),
        (IDS, "input_ids", "56", " must be a list of whole numbers, not str '56'"),
        (LABELLED, "labels", [5, 259], ": 259 at position 1 .from 0. is out of range 0..258"),
        (LABELLED, "labels", [-100, -7], ": -7 at position 1"),
        (LABELLED, "labels", [6, 7], ": 7 at position 1 .from 0., where the token is 6"),
        (LABELLED, "labels", [5], " has 1 values for 2 input_ids"),
        (LABELLED, "labels", None, " must be a list of whole numbers, not null or missing"),
        ({**IDS, "assistant_masks": [0, 1]}, "assistant_masks", [0, 2], ": 2 at position 1"),
        (TEXT, "text", None, " must be text, not null or missing"),
        (TEXT, "text", 3, " must be text, not int 3"),
        (MESSAGES, "messages", [], " must be a list of messages .* not an empty list"),
        (MESSAGES, "messages", "hi", " must be a list of messages .* not str 'hi'"),
        (
            MESSAGES,
            "messages",
            [{"role": "human", "content": "x"}],
            ": message 1 has the unknown role 'human'; roles are sys",
        ),
        (MESSAGES, "messages", [CHAT[0], {"content": "x"}], ": message 2 has the unknown role None"),
        (
            MESSAGES,
            "messages",
            [CHAT[0], {"role": "user"}],
            ": the content of message 2 must be text, not null or missing",
        ),
        (
            MESSAGES,
            "messages",
            [{"role": "user", "content": [1]}],
            r": the content of message 1 must be text, not list \[1\]",
        ),
        (PAIR, "completion", CHAT[1:], " must be text, not list"),
        (CHAT_PAIR, "completion", "a", " must be a list of messages"),
        (CHAT_PAIR, "completion", None, " must be a list of messages .* not null or missing"),
    ],
)
def test_a_bad_row_is_named(good, column, bad, message, tokenizer):
    """As training reads it, past the first block."""
    rows = [good] * 1500 + [{**good, column: bad}]
    with pytest.raises(DataError, match=f"^rows.jsonl, row 1501, column '{column}'{message}") as caught:
        encode_rows(rows, tokenizer, SFTDataConfig(), vocab_size=len(tokenizer), name="rows.jsonl")
    assert "\n" not in str(caught.value)
