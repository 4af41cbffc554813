"""What TRL's own functions make of the same rows."""

import copy
import json
import random

import pytest

from jaxpost.data.formats import BadRows, blocks, row_type
from jaxpost.data.messages import is_conversational
from jaxpost.data.mixture import hold_out, mix, parse_member
from jaxpost.data.preference import extract_prompt, judged, pairs, unpair_preference
from jaxpost.data.rows import as_rows

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
pytestmark = pytest.mark.parity

USER, ASKED = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
SAID, OTHER = {"role": "assistant", "content": "c"}, {"role": "assistant", "content": "d"}


def random_text(draw, least=0):
    return "".join(draw.choices("ab ", k=draw.randint(least, 8)))


def random_chat(draw):
    return [draw.choice([USER, ASKED, SAID, OTHER]) for _ in range(draw.randint(1, 5))]


@pytest.mark.parametrize("seed", range(4))
def test_extract_prompt(seed):
    draw = random.Random(seed)
    for _ in range(500):
        for make in (lambda: random_text(draw, least=1), lambda: random_chat(draw)):
            example = {"chosen": make(), "rejected": make()}
            if example["chosen"][0] != example["rejected"][0] and example["chosen"][-1] == " ":
                continue  # TRL looks at the last character there
            assert extract_prompt(example) == trl.extract_prompt(example)


PREFERENCES = [
    {"prompt": "p", "chosen": "p a", "rejected": "p b"},
    {"chosen": "p a", "rejected": "p b"},
    {"prompt": [USER], "chosen": [SAID], "rejected": [OTHER]},
    {"chosen": [USER, SAID], "rejected": [USER, OTHER]},
    {"prompt": "a", "chosen": [USER, SAID], "rejected": [USER, OTHER]},
    {"chosen": [USER, SAID, ASKED, SAID], "rejected": [USER, SAID, ASKED, OTHER]},
]


@pytest.mark.parametrize("example", PREFERENCES)
def test_pairs_are_those_of_maybe_extract_prompt(example):
    [block] = blocks([example], "d")
    kind, column, conversational = row_type(block)
    assert (kind, column) == ("preference", "chosen")
    expected = trl.maybe_extract_prompt(example)
    [pair] = pairs(block, conversational)
    assert pair._asdict() == {name: expected[name] for name in pair._fields}


def test_unpaired_preferences():
    rows = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}", "id": n} for n in range(7)]
    expected = trl.unpair_preference_dataset(datasets.Dataset.from_list(rows))
    [block] = blocks(rows, "d")
    assert unpair_preference(block.columns) == expected[:]
    assert [row._asdict() for row in judged(block, False)] == expected.remove_columns("id").to_list()


@pytest.mark.parametrize("rows", [2500, 1000])
def test_unpaired_preferences_stand_in_the_same_order_over_several_blocks(rows):
    rows = [{"prompt": "p", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(rows)]
    expected = trl.unpair_preference_dataset(datasets.Dataset.from_list(rows))
    bad_rows, found = BadRows(), []
    for block in blocks(rows, "d", bad_rows):
        for _, part in bad_rows.attempt(block, lambda block: judged(block, False)):
            found += [row.completion for row in part]
    assert found == expected["completion"][:]


@pytest.mark.parametrize(
    "value", ["text", [USER], [USER, SAID], ["a"], [{"content": "x"}], [{"role": "user"}], 3, None]
)
def test_is_conversational(value):
    for column in ("prompt", "messages", "chosen", "completion"):
        assert is_conversational(value) == trl.is_conversational({column: value})


@pytest.mark.parametrize("column", ["conversations", "messages", "prompt", "completion", "chosen", "rejected"])
@pytest.mark.parametrize("roles", [("user", "assistant"), ("system", "user", "assistant", "tool", "assistant")])
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_sharegpt_with_roles_that_trl_knows(column, roles, keys):
    """TRL leaves the roles as they are; ShareGPT's own (human, gpt) it does not know."""
    row = {column: [dict(zip(keys, (role, f"{n}"), strict=True)) for n, role in enumerate(roles)], "id": 1}
    expected = trl.maybe_convert_to_chatml(copy.deepcopy(row))
    [block] = blocks([row], "d")
    assert {name: cells[0] for name, cells in block.columns.items()} == expected


@pytest.mark.parametrize("fractions", [None, (0.5, 0.5), (3, 1), (1, 0), (0.13, 0.87), (1e-3, 1)])
def test_mixtures(fractions, tmp_path, monkeypatch):
    from trl import DatasetMixtureConfig, get_dataset

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    entries = []
    for name, count in (("a", 37), ("b", 90)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name}{n}", "n": n}) + "\n" for n in range(count)))
        entries.append({"path": "json", "data_files": str(path), "columns": ["text"]})
    for entry, fraction in zip(entries, fractions or (None, None), strict=True):
        entry["fraction"] = fraction
    members = [parse_member(entry, n) for n, entry in enumerate(entries, start=1)]
    expected = get_dataset(DatasetMixtureConfig(datasets=entries))["train"]
    assert list(mix(members, seed=0)) == expected.to_list()


@pytest.mark.parametrize("size", [0.1, 0.33, 0.999, 1, 7, 99])
def test_as_many_rows_are_held_out(size):
    rows = [{"n": n} for n in range(100)]
    try:
        expected = datasets.Dataset.from_list(rows).train_test_split(test_size=size)
    except ValueError:
        with pytest.raises(ValueError, match="both parts need rows"):
            hold_out(as_rows(rows, "d"), size, 0)
        return
    assert [len(part) for part in hold_out(as_rows(rows, "d"), size, 0)] == [
        len(expected["train"]),
        len(expected["test"]),
    ]
