"""Mixtures of datasets and held-out rows: which rows, in which order, and what is refused."""

import json
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest

from jaxpost.data.mixture import Member, hold_out, interleave, load_datasets, mix, parse_member, select
from jaxpost.data.rows import as_rows
from jaxpost.data.sources import DatasetConfig
from jaxpost.errors import ConfigError, DataError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count, name, streams=False):
    """Rows that tell their names and numbers."""
    rows = [{"text": f"{name}{n}"} for n in range(count)]
    return as_rows((lambda: iter(rows)) if streams else rows, name)


@pytest.fixture
def files(tmp_path):
    return {
        name: write(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n}", "n": n} for n in range(count)])
        for name, count in (("a", 100), ("b", 30), ("c", 10))
    }


def texts(rows, start=0):
    return [row.cells["text"] for row in rows(start)]


def mixed(files, **shares):
    """The mixture of the named files with shares as (kind, number) pairs."""
    members = [Member(path=files[name], **({} if share is None else dict([share]))) for name, share in shares.items()]
    return mix(members, seed=0)


def test_without_shares_all_rows_come_one_dataset_after_the_other(files):
    rows = mixed(files, c=None, b=None)
    assert texts(rows) == [f"c{n}" for n in range(10)] + [f"b{n}" for n in range(30)]
    assert len(rows) == 40 and texts(rows, 35) == [f"b{n}" for n in range(25, 30)]
    assert next(rows(10)).place == f"{files['b']}, row 1"


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        ({"a": 0.5, "b": 0.5}, {"a": 30, "b": 30}),
        ({"a": 3, "b": 1}, {"a": 90, "b": 30}),
        ({"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 60, "b": 30, "c": 10}),
        ({"a": 0.9, "b": 0.3, "c": 0}, {"a": 90, "b": 30}),
        ({"c": 0.8, "b": 0.6}, {"c": 10, "b": 7}),
    ],
)
def test_fractions_take_the_first_rows_and_none_twice(files, shares, counts):
    rows = mixed(files, **{name: ("fraction", share) for name, share in shares.items()})
    assert texts(rows) == [f"{name}{n}" for name, count in counts.items() for n in range(count)]
    assert len(rows) == sum(counts.values())


@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (0.7, 0.2, 0.1), (5, 3, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_with_weights_every_beginning_has_the_right_shares(weights, seed):
    parts = [numbered(1000, "abcd"[p]) for p in range(len(weights))]
    order = [text[0] for text in texts(interleave(parts, weights, seed))]
    for n in range(1, len(order) + 1):
        counts = Counter(order[:n])
        for p, weight in enumerate(weights):
            assert abs(counts["abcd"[p]] - n * weight / sum(weights)) < max(1.001, len(weights) - 1)


def test_with_weights_rows_keep_their_order_and_none_comes_twice():
    rows = interleave([numbered(100, "a"), numbered(30, "b")], [2, 1], 0)
    found = texts(rows)
    counts = Counter(text[0] for text in found)
    assert counts["b"] == 30 and 58 <= counts["a"] <= 62 and len(rows) == len(found)
    for name in "ab":
        assert [text for text in found if text[0] == name] == [f"{name}{n}" for n in range(counts[name])]


def test_a_mixture_starts_anywhere_and_is_the_same_for_streams_but_for_its_length():
    sized, streamed = (
        interleave([numbered(50, "a", streams), numbered(40, "b", streams)], [1, 3], 7) for streams in (False, True)
    )
    whole = texts(sized)
    for start in (0, 1, 17, len(whole) - 1, len(whole)):
        assert texts(sized, start) == texts(streamed, start) == whole[start:]
    assert len(sized) == len(whole) and streamed.size is None


def test_the_turns_are_drawn_from_the_seed():
    def order(seed, *weights):
        parts = [numbered(9, name) for name, _ in zip("abc", weights, strict=False)]
        return "".join(text[0] for text in texts(interleave(parts, weights, seed)))

    assert {order(seed, 2, 1)[:3] for seed in range(20)} == {"aab", "aba", "baa"}
    # The same on every machine, with every numpy.
    golden = ["abacabaabacabaab", "cabaabacabaabacab", "abaacbaabaacbaab"]
    assert [order(seed, 4, 2, 1) for seed in range(3)] == golden


def test_endless_streams_can_be_mixed():
    endless = as_rows(lambda: ({"text": "a"} for _ in iter(int, 1)), "a")
    rows = interleave([endless, as_rows(lambda: ({"text": "b"} for _ in iter(int, 1)), "b")], [3, 1], 0)
    assert Counter(row.cells["text"] for row in islice(rows(), 4000)) == {"a": 3000, "b": 1000}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": ("fraction", 1.0), "b": None}, "give every entry a fraction, or every entry a weight"),
        ({"a": ("weight", 1.0), "b": None}, "give every entry a fraction"),
        ({"a": ("weight", 1.0), "b": ("fraction", 1.0)}, "give every entry a fraction"),
        ({"a": ("weight", 0.0), "b": ("weight", 0.0)}, "every weight is 0"),
        ({"a": ("fraction", 0.0)}, "every fraction is 0"),
    ],
)
def test_shares_that_do_not_fit_together(files, shares, message):
    with pytest.raises(ConfigError, match=message):
        mixed(files, **shares)


def test_a_stream_has_no_fraction(monkeypatch):
    stream = datasets.Dataset.from_list([{"text": "x"}]).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream)
    members = [Member(path="owner/a", fraction=1), Member(path="owner/b", fraction=1)]
    with pytest.raises(ConfigError, match=r"owner/a \(train\) is a stream, which can have a weight, but no fraction"):
        mix(members, seed=0, streaming=True)
    assert len(list(mix([Member(path="owner/a", weight=1)], seed=0, streaming=True)())) == 1


@pytest.mark.parametrize(
    ("other", "kind", "column"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "language_modeling with messages", "messages"),
        ({"prompt": "x", "completion": "y"}, "prompt_completion with no messages", "prompt"),
        ({"chosen": "x", "rejected": "y"}, "preference with no messages", "chosen"),
        ({"input_ids": [1]}, "tokenized with no messages", "input_ids"),
    ],
)
def test_rows_of_two_types_are_refused_by_both_names(files, tmp_path, other, kind, column):
    path = write(tmp_path / "d.jsonl", [other])
    with pytest.raises(DataError) as caught:
        mix([Member(path=files["a"]), Member(path=path)], seed=0)
    first = f"{files['a']} is language_modeling with no messages"
    told = f"{first}, but {path} is {kind} (told by column {column!r})"
    assert str(caught.value) == f"a mixture must be of one type: {told}"


def test_types_are_compared_after_normalising_and_despite_bad_rows(tmp_path):
    chat = [{"role": "user", "content": "x"}]
    one = write(tmp_path / "one.jsonl", [3, {"messages": None}, {"messages": chat}])
    two = write(tmp_path / "two.jsonl", [{"conversations": [{"from": "human", "value": "x"}]}])
    assert len(mix([Member(path=one), Member(path=two)], seed=0)) == 4
    with pytest.raises(DataError, match="has the columns messages; accepted are 'input_ids'"):
        mix([Member(path=one)], seed=0, accepted=("tokenized",))
    body = write(tmp_path / "body.jsonl", [{"body": "x"}])
    assert len(mix([Member(path=body)], seed=0, text_field="body")) == 1


def test_columns_are_selected(files):
    rows = select(as_rows([{"a": 1, "b": 2, "c": 3}, {"a": 1}, 3], "d"), ["c", "a"])
    assert [row.cells for row in islice(rows(), 2)] == [{"c": 3, "a": 1}, {"a": 1}] and len(rows) == 3
    assert "row 3" in str(next(rows(2)))
    assert list(mix([Member(path=files["c"], columns=["text"])], seed=0))[3] == {"text": "c3"}
    with pytest.raises(
        DataError, match=r"c.jsonl has no column 'txt' \(did you mean 'text'\?\); columns found: text, n"
    ):
        mix([Member(path=files["c"], columns=["txt"])], seed=0)


def test_members_are_read_from_yaml():
    entry = {"path": "p", "name": None, "split": "test", "columns": ["a"], "weight": "1e-1", "data_files": ["x"]}
    expected = Member(path="p", split="test", columns=["a"], weight=0.1, data_files=["x"])
    assert parse_member(entry, 1) == expected


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a.jsonl", "entry 2 is 'a.jsonl'; it must be a mapping with a path"),
        ({"name": "x"}, "entry 2 has no path"),
        ({"path": None}, "entry 2 has no path"),
        ({"path": "a", "wieght": 1}, r"entry 2: unknown key 'wieght' \(did you mean 'weight'\?\); keys are path, name"),
        ({"path": 3}, "entry 2: path is 3; it must be text"),
        ({"path": "a", "split": ["x"]}, r"entry 2: split is \['x'\]; it must be text"),
        ({"path": "a", "columns": "text"}, "entry 2: columns is 'text'; it must be a list of names"),
        ({"path": "a", "columns": [3]}, "entry 2: columns is"),
        ({"path": "a", "data_files": 3}, "entry 2: data_files is 3"),
        *(
            ({"path": "a", kind: value}, f"entry 2: {kind} is .*; it must be a number that is not negative")
            for kind in ("weight", "fraction")
            for value in (-1, "much", True, float("nan"), float("inf"), [1])
        ),
    ],
)
def test_a_wrong_entry_is_named(entry, message):
    with pytest.raises(ConfigError, match=f"^datasets, {message}"):
        load_datasets(DatasetConfig(datasets=[{"path": "b"}, entry]), seed=0, evaluates=False)


@pytest.mark.parametrize(("size", "count"), [(0.1, 10), (0.001, 1), (0.999, 99 + 1), (7, 7), (7.0, 7), (99, 99)])
def test_rows_are_held_out(size, count):
    rows = numbered(100, "a")
    if count == 100:
        with pytest.raises(ConfigError, match=r"test_split_size 0.999 takes 100 of the 100 rows; both parts need rows"):
            hold_out(rows, size, 0)
        return
    train, test = hold_out(rows, size, 0)
    assert (len(train), len(test)) == (100 - count, count)
    order = {text: n for n, text in enumerate(texts(rows))}
    for part in (train, test):
        found = texts(part)
        assert len(found) == len(part) and found == sorted(found, key=order.__getitem__)
        for start in (0, 1, len(part) // 2, len(part)):
            assert texts(part, start) == found[start:]
    assert sorted([*texts(train), *texts(test)], key=order.__getitem__) == texts(rows)
    assert texts(hold_out(rows, size, 0)[1]) == texts(test)
    assert count > 90 or texts(hold_out(rows, size, 1)[1]) != texts(test)


def test_held_out_rows_are_spread():
    chosen = [int(text[1:]) for text in texts(hold_out(numbered(10_000, "a"), 0.1, 3)[1])]
    assert np.all(np.abs(np.histogram(chosen, 10, (0, 10_000))[0] - 100) < 40)


def test_a_stream_has_nothing_to_hold_out():
    with pytest.raises(ConfigError, match="test_split_size needs the number of rows, which the stream a does not tell"):
        hold_out(numbered(10, "a", streams=True), 0.1, 0)


def load(evaluates=True, **options):
    train, test = load_datasets(DatasetConfig(**options), seed=0, evaluates=evaluates)
    return texts(train), test and texts(test)


def test_what_a_run_trains_and_evaluates_on(tmp_path, files):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", [{"text": f"t{n}"} for n in range(20)])
    write(folder / "test.jsonl", [{"text": "e"}])
    whole = [f"t{n}" for n in range(20)]
    assert load(dataset_name=str(folder)) == (whole, ["e"])
    assert load(False, dataset_name=str(folder)) == (whole, None)
    train, test = load(dataset_name=str(folder), test_split_size=0.25)
    assert sorted(train + test) == sorted(whole) and len(test) == 5
    assert load(False, dataset_name=str(folder), test_split_size=0.25) == (train, None)
    mixture = [{"path": files["b"]}, {"path": files["c"]}]
    assert len(load(False, datasets=mixture)[0]) == 40
    assert [len(part) for part in load(datasets=mixture, test_split_size=4)] == [36, 4]
    with pytest.raises(ConfigError, match="a mixture has no test split to evaluate on; give --test_split_size"):
        load(datasets=mixture)
    with pytest.raises(ConfigError, match="no data: give --dataset_name"):
        load()
