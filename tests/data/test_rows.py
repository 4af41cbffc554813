"""Rows of lists, `datasets` objects and functions: from any row on, again and again, with names for messages."""

import datasets
import pyarrow
import pytest

from jaxpost.data.rows import Row, RowError, Rows, as_rows, describe, join, take
from jaxpost.errors import DataError

NUMBERS = [{"n": n} for n in range(2500)]


def values(rows, start=0):
    return [row.cells["n"] for row in rows(start)]


def kinds():
    """The same rows in every form that Python holds them in."""
    table = datasets.Dataset.from_list(NUMBERS)
    return {
        "list": NUMBERS,
        "tuple": tuple(NUMBERS),
        "dataset": table,
        "formatted": table.with_format("numpy"),
        "selected": datasets.Dataset.from_list(NUMBERS[::-1]).select(range(2499, -1, -1)),
        "stream": table.to_iterable_dataset(),
        "function": lambda: iter(NUMBERS),
        "generator": lambda: ({"n": n} for n in range(2500)),
    }


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_gives_the_same_rows_from_anywhere_on_and_again(kind):
    rows = as_rows(kinds()[kind], "d")
    for start in (0, 7, 999, 1000, 2499, 2500, 2600, 0):
        assert values(rows, start) == list(range(start, 2500))
        assert type(next(rows(2), None).cells["n"]) is int
    assert next(rows(1234)).place == "d, row 1235"
    assert rows.column_names == ["n"] and rows["n"] == list(range(2500))
    assert rows.size == (None if kind in ("stream", "function", "generator") else 2500)
    assert as_rows(rows, "other") is rows


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter(NUMBERS), "d is a list_iterator, which can be read only once; give the function"),
        ((row for row in NUMBERS), "d is a generator, which can be read only once"),
        (
            datasets.DatasetDict(train=datasets.Dataset.from_list(NUMBERS), test=None),
            "d has the splits train, test; give",
        ),
        (datasets.Dataset.from_list(NUMBERS).with_transform(lambda batch: batch), "d has a transform"),
        ({"n": [1, 2]}, "d is a dict; give a list of dicts"),
        (None, "d is a NoneType; give"),
        (3, "d is a int; give"),
    ],
)
def test_what_holds_no_rows_says_what_does(data, message):
    with pytest.raises(DataError, match=message):
        as_rows(data, "d")


def test_a_row_that_is_no_dict_is_its_error():
    first, second = as_rows([{"n": 1}, "n"], "d")(0)
    assert isinstance(first, Row) and isinstance(second, RowError)
    assert str(second) == "d, row 2: a row must be an object with columns, not str 'n'"
    assert second.reason == "a row must be an object with columns"


def test_dicts_in_arrow_lose_the_keys_that_they_never_had():
    rows = [
        {"m": [{"role": "user", "content": "a", "call": {"x": 1}}, {"role": "tool", "call": {"y": 2}}], "z": None},
        {"m": None, "z": {"a": 1}},
    ]
    table = datasets.Dataset.from_list(rows, on_mixed_types=None)
    assert "content" in table[0]["m"][1] and "y" in table[0]["m"][0]["call"]
    assert list(as_rows(table, "d")) == rows
    assert list(as_rows(table.to_iterable_dataset(), "d")) == rows


def test_nulls_that_were_stored_as_json_stay():
    rows = [{"m": [{"default": None, "a": 1}]}, {"m": [{"a": "x"}]}]
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    assert list(as_rows(table, "d")) == rows


def test_text_in_arrow_that_is_no_utf8_is_one_bad_row():
    texts = [b"a", b"b", b"\xff", b"d"] * 600
    table = pyarrow.table({"t": pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())})
    found = list(as_rows(datasets.Dataset(datasets.table.InMemoryTable(table)), "d")(1))
    assert len(found) == 2399
    assert [n for n, row in enumerate(found) if isinstance(row, RowError)] == list(range(1, 2399, 4))
    assert str(found[1]) == "d, row 3: not valid UTF-8" and found[2] == Row({"t": "d"}, "d, row 4")


def test_what_fails_behind_a_stream_is_one_line_with_its_row():
    def rows():
        yield from NUMBERS[:3]
        raise ConnectionError("gone\naway")

    stream = as_rows(datasets.IterableDataset.from_generator(rows), "d")
    with pytest.raises(DataError, match=r"^d, row 4: cannot be read \(.*gone away\)$"):
        list(stream(1))


def test_take_and_join_start_anywhere_whether_or_not_the_numbers_of_rows_are_known():
    sized, unsized = as_rows(NUMBERS, "s"), as_rows(lambda: iter(NUMBERS), "u")
    few = [take(rows, 5) for rows in (sized, unsized)]
    assert few[0].size == 5 and few[1].size is None and take(sized, 9999).size == 2500
    assert [values(rows, 3) for rows in few] == [[3, 4]] * 2 and values(few[0], 6) == []
    empty = as_rows([], "e")
    for parts in ([few[0], empty, few[0]], [few[1], few[1]], [few[0], few[1]], [few[1], as_rows(list, "e"), few[0]]):
        joined = join(parts, "j")
        for start in range(12):
            assert values(joined, start) == [*range(5), *range(5)][start:]
        assert joined.size == (10 if few[1] not in parts else None)
    assert [row.place for row in join(few, "j")(4)][:2] == ["s, row 5", "u, row 1"]


def test_a_stream_has_no_length_but_is_true():
    stream = Rows("d", lambda start: iter([]))
    assert stream and bool(as_rows([], "e"))
    with pytest.raises(TypeError, match="d is a stream"):
        len(stream)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null or missing"),
        ("", "an empty str"),
        ([], "an empty list"),
        (3, "int 3"),
        ("x" * 50_000_000, "str 'x"),
        ([["y"] * 1000] * 100_000, "list [['y',"),
    ],
)
def test_a_value_is_described_in_a_few_words(value, text):
    assert describe(value).startswith(text) and len(describe(value)) < 80
