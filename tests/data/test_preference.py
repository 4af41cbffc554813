"""Pairs of completions, judged completions and steps; against TRL in tests/parity."""

import pytest

from jaxpost.data.formats import BadRows, Block, blocks, row_type
from jaxpost.data.preference import Judged, Pair, Steps, extract_prompt, judged, pairs, steps, unpair_preference
from jaxpost.data.rows import RowError

USER, ASKED = {"role": "user", "content": "a"}, {"role": "user", "content": "c"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
CHATS = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}


def one(row, read=pairs):
    [block] = blocks([row], "d")
    return read(block, row_type(block).conversational)[0]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is red", "The sky is"),
        ("ab", "abc", "a"),
        ("same", "same", "sam"),
        ("x", "y", ""),
        ("x ", "y ", ""),  # TRL cuts "x" off here
        ("", "y", ""),
        ([USER, GOOD], [USER, BAD], [USER]),
        ([USER, GOOD, ASKED, GOOD], [USER, GOOD, ASKED, BAD], [USER, GOOD, ASKED]),
        ([USER, GOOD], [USER, GOOD, ASKED, GOOD], [USER]),
        ([USER, GOOD], [ASKED, GOOD], []),
    ],
)
def test_what_both_begin_with_is_the_prompt(chosen, rejected, prompt):
    found = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert found["prompt"] == prompt
    assert (prompt + found["chosen"], prompt + found["rejected"]) == (chosen, rejected)


def test_pairs_with_and_without_a_prompt():
    assert one({"prompt": "a", "chosen": "b", "rejected": "c"}) == Pair("a", "b", "c")
    assert one({"chosen": "a b", "rejected": "a c"}) == Pair("a", " b", " c")
    assert one({"prompt": None, "chosen": "a b", "rejected": "a c"}) == Pair("a", " b", " c")
    for row in (CHATS, WHOLE, {**WHOLE, "prompt": "a"}, {**WHOLE, "prompt": None}):  # the text repeats the first turn
        assert one(row) == Pair([USER], [GOOD], [BAD])
    assert one({"prompt": "", "chosen": "b", "rejected": "c"}) == Pair("", "b", "c")


def test_unpaired_rows_are_all_chosen_then_all_rejected():
    columns = {"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"], "id": [1, 2]}
    assert unpair_preference(columns) == {
        "prompt": ["p", "q", "p", "q"],
        "completion": ["a", "b", "c", "d"],
        "label": [True, True, False, False],
        "id": [1, 2, 1, 2],
    }


def test_judged_completions_are_read_from_pairs_too():
    rows = [{"prompt": "p", "completion": "a", "label": True}, {"prompt": "p", "completion": "b", "label": 0}]
    [block] = blocks(rows, "d")
    assert judged(block, False) == [Judged("p", "a", True), Judged("p", "b", False)]
    assert [row.label for row in judged(block, False)] == [True, False]
    [block] = blocks([WHOLE, CHATS], "d")
    assert judged(block, True) == [Judged([USER], [said], said is GOOD) for said in (GOOD, GOOD, BAD, BAD)]
    assert one({"prompt": [USER], "completion": [BAD], "label": False}, judged) == Judged([USER], [BAD], False)


def test_steps():
    row = {"prompt": "p", "completions": ["a", "b"], "labels": [True, 0]}
    [block] = blocks([row], "d")
    assert row_type(block).kind == "stepwise"
    assert steps(block) == [Steps("p", ["a", "b"], [True, False])] and steps(block)[0].labels[1] is False


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
JUDGED = {"prompt": "a", "completion": "b", "label": True}
STEPS = {"prompt": "a", "completions": ["b"], "labels": [True]}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("read", "good", "changed", "message"),
    [
        (pairs, PAIR, {"chosen": None}, "column 'chosen' must be text, not null or missing"),
        (pairs, PAIR, {"rejected": 3}, "column 'rejected' must be text, not int 3"),
        (pairs, PAIR, {"rejected": ""}, "column 'rejected' is empty"),
        (pairs, PAIR, {"prompt": [USER]}, "column 'prompt' must be text, not list"),
        (pairs, PAIR, {"chosen": [GOOD]}, "column 'chosen' must be text, not list"),
        (pairs, CHATS, {"chosen": "b"}, "column 'chosen' must be a list of messages"),
        (pairs, CHATS, {"chosen": [USER]}, "column 'chosen' must begin with a message of the assistant, not of 'user'"),
        (pairs, CHATS, {"rejected": []}, "column 'rejected' must be a list of messages .* not an empty list"),
        (pairs, CHATS, {"rejected": [{**BAD, "content": ""}]}, "column 'rejected' is empty"),
        (pairs, CHATS, {"prompt": [SYSTEM]}, "column 'prompt' must have a message beside the system's"),
        (pairs, CHATS, {"prompt": [USER, SYSTEM]}, "column 'prompt': a system message must come before all others"),
        (pairs, WHOLE, {"rejected": [ASKED, BAD]}, "column 'chosen' must begin with messages that 'rejected' begins"),
        (pairs, WHOLE, {"rejected": [USER, ASKED]}, "column 'rejected' must begin with a message of the assistant"),
        (judged, JUDGED, {"label": -1}, "column 'label' must be true or false, not int -1"),
        (judged, JUDGED, {"label": None}, "column 'label' must be true or false, not null"),
        (judged, JUDGED, {"label": "good"}, "column 'label' must be true or false, not str"),
        (judged, JUDGED, {"label": 1.0}, "column 'label' must be true or false, not float"),
        (judged, JUDGED, {"completion": ""}, "column 'completion' is empty"),
        (judged, PAIR, {"rejected": None}, "column 'rejected' must be text, not null"),
        (steps, STEPS, {"completions": "b"}, "column 'completions' must be a list with a value for each step, not str"),
        (steps, STEPS, {"completions": []}, "column 'completions' must be a list with a value for each step"),
        (steps, STEPS, {"completions": [3]}, "column 'completions': each must be text, not int 3"),
        (steps, STEPS, {"completions": [""]}, r"column 'completions': a step is empty \(number 1\)"),
        (steps, STEPS, {"labels": [-1]}, r"column 'labels' must be true or false for each step, not list \[-1\]"),
        (steps, STEPS, {"labels": [True, True]}, "column 'labels' has not one value for each of completions: 2 for 1"),
        (steps, STEPS, {"labels": None}, "column 'labels' must be a list with a value for each step, not null"),
        (steps, STEPS, {"prompt": 3}, "column 'prompt' must be text"),
    ],
)
def test_a_bad_row_is_named_or_skipped(read, good, changed, message):
    rows = [good, {**good, **changed}, good]
    [block] = blocks(rows, "d.jsonl")

    def encode(part: Block):
        return read(part) if read is steps else read(part, row_type(block).conversational)

    with pytest.raises(RowError, match=f"^d.jsonl, row 2, {message}"):
        encode(block)
    bad_rows = BadRows("skip")
    assert [part.place(0) for part, _ in bad_rows.attempt(block, encode)] == ["d.jsonl, row 1", "d.jsonl, row 3"]
    assert str(bad_rows).startswith("1 rows skipped: 1 x column")
