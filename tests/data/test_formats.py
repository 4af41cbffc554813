"""The types of rows, blocks of them, and what becomes of bad ones."""

import datasets
import numpy as np
import pytest

from jaxpost.data.formats import BadRows, Block, RowType, blocks, detect_type, row_type
from jaxpost.data.messages import MAX_CHARACTERS, is_conversational
from jaxpost.data.rows import RowError, as_rows
from jaxpost.errors import DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
USER, ASSISTANT = CHAT
SYSTEM, TOOL = {"role": "system", "content": "s"}, {"role": "tool", "content": "4"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "x"}, ("language_modeling", "text", False)),
        ({"messages": CHAT}, ("language_modeling", "messages", True)),
        ({"conversations": [{"from": "human", "value": "x"}]}, ("language_modeling", "messages", True)),
        ({"text": "x", "messages": None}, ("language_modeling", "text", False)),
        ({"text": None, "messages": CHAT}, ("language_modeling", "messages", True)),
        ({"prompt": "x", "messages": CHAT}, ("language_modeling", "messages", True)),
        ({"prompt": "x", "completion": "y", "text": "z"}, ("prompt_completion", "prompt", False)),
        ({"instruction": "x", "output": "y"}, ("prompt_completion", "prompt", True)),
        ({"prompt": CHAT, "answer": "4"}, ("prompt_only", "prompt", True)),
        ({"input_ids": [1], "labels": [1], "text": "x"}, ("tokenized", "input_ids", False)),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, ("preference", "chosen", False)),
        ({"chosen": CHAT, "rejected": CHAT}, ("preference", "chosen", True)),
        ({"prompt": "x", "completion": "y", "label": True}, ("unpaired_preference", "prompt", False)),
        ({"prompt": "x", "completions": ["y"], "labels": [True]}, ("stepwise", "prompt", False)),
    ],
)
def test_types(row, expected):
    [block] = blocks([row], "d")
    assert row_type(block) == RowType(*expected)
    assert detect_type(list(block.columns), {c: cells[0] for c, cells in block.columns.items()}) == expected[0]


def test_a_method_sees_the_types_that_it_accepts():
    row = {"prompt": "x", "completion": "y", "label": 3}
    assert detect_type(list(row), row, accepted=("prompt_completion", "language_modeling")) == "prompt_completion"
    with pytest.raises(DataError, match="d has the columns prompt, completion, label; accepted are 'chosen' with 'rej"):
        detect_type(list(row), row, name="d", accepted=("preference",))


def test_a_text_column_has_the_name_that_it_is_given():
    assert detect_type(["body"], {"body": "x"}, text_field="body") == "language_modeling"
    expected = r"d has the columns body, id; accepted are 'input_ids', or .*'messages', or .*'text' \(named by --datase"
    with pytest.raises(DataError, match=expected):
        detect_type(["body", "id"], {"body": "x", "id": 1}, name="d")


def test_a_bad_first_row_does_not_tell_the_type():
    [block] = blocks([{"messages": None}, {"messages": []}, {"messages": CHAT}], "d")
    assert row_type(block).conversational


def test_is_conversational():
    assert is_conversational(CHAT)
    for value in ("text", [], None, ["text"], [{"from": "human", "value": "x"}]):
        assert not is_conversational(value)


def test_blocks_cover_lists_and_datasets_alike():
    rows = [{"text": str(i), **({"n": i} if i else {})} for i in range(2500)]
    for source in (rows, datasets.Dataset.from_list([{"text": r["text"], "n": r.get("n")} for r in rows])):
        found = list(blocks(source, "rows"))
        assert [(block.first, len(block)) for block in found] == [(0, 1000), (1000, 1000), (2000, 500)]
        assert [text for block in found for text in block.texts("text")] == [row["text"] for row in rows]
        assert found[0].columns["n"][:2] == [None, 1]
        assert found[2].where(3, "n") == "rows, row 2004, column 'n'"
        [last] = blocks(source, "rows", start=2400)
        assert last.first == 2400 and last.texts("text")[0] == "2400" and last.place(0) == "rows, row 2401"
        assert last.part(20, 30).texts("text") == last.texts("text")[20:30] and last.part(20, 30).first == 2420
    with pytest.raises(DataError, match="rows has no rows"):
        next(blocks([], "rows"))
    assert list(blocks(rows, "rows", start=2500)) == []


def test_a_column_stays_once_it_has_been_seen():
    rows = [{"text": "x", "id": 1}] * 1000 + [{"text": "x"}] * 1000 + [{"text": "x", "more": 2}]
    assert [list(block.columns) for block in blocks(rows, "d")] == [
        ["text", "id"],
        ["text", "id"],
        ["text", "id", "more"],
    ]
    with pytest.raises(DataError, match="d, row 1002, column 'labels' is missing in all of the rows before"):
        list(blocks([{"input_ids": [1]}] * 1001 + [{"input_ids": [1], "labels": [1]}], "d"))


def test_messages_without_their_null_keys():
    block = Block({"m": [[{"role": "user", "content": "x", "name": None, "n": 0}]]}, 0, "rows")
    assert block.messages("m") == [[{"role": "user", "content": "x", "n": 0}]]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("messages", [SYSTEM, USER, {**CALL, "content": None}, TOOL, TOOL, ASSISTANT]),
        ("messages", [{"role": "developer", "content": "x"}, SYSTEM, USER, {**CALL, "content": ""}]),
        ("messages", [USER, USER, ASSISTANT, ASSISTANT]),
        ("messages", [ASSISTANT, USER]),
        ("messages", [SYSTEM]),
        ("messages", [USER, {"role": "assistant", "content": ""}]),
        ("messages", [USER, {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "{}"}]}]),
        ("prompt", CHAT),
        ("prompt", [USER, CALL, TOOL]),
        ("completion", [CALL, TOOL, ASSISTANT]),
        ("completion", [CALL]),
        ("completion", [ASSISTANT, USER, ASSISTANT]),
    ],
)
def test_orders_that_a_template_may_take(column, value):
    assert len(Block({column: [value]}, 0, "d").messages(column)[0]) == len(value)


def test_tools_and_template_kwargs():
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    rows = [{"text": "x", "tools": tools} for tools in ([tool], f"[{tool}]".replace("'", '"'), None, [], "", "[]")]
    [block] = blocks([*rows, {"text": "x", "chat_template_kwargs": {"enable_thinking": False}}], "d")
    assert block.tools() == [[tool], [tool], None, None, None, None, None]
    assert block.template_kwargs() == [{}] * 6 + [{"enable_thinking": False}]
    [bare] = blocks([{"text": "x"}], "d")
    assert (bare.tools(), bare.template_kwargs()) == ([None], [{}])


def test_numbers():
    [block] = blocks([{"margin": 1}, {"margin": -0.5}], "d")
    assert block.numbers("margin") == [1.0, -0.5]


READERS = {
    "text": lambda block: block.texts("text"),
    "completion": lambda block: block.texts("completion"),
    "messages": lambda block: block.messages("messages"),
    "prompt": lambda block: block.messages("prompt"),
    "answer": lambda block: block.messages("completion"),
    "ids": lambda block: [block.integers("ids", i, 259) for i in range(len(block))],
    "labels": lambda block: [block.label_mask(i, np.array([5, 6]), 259) for i in range(len(block))],
    "tools": lambda block: block.tools(),
    "kwargs": lambda block: block.template_kwargs(),
    "label": lambda block: block.booleans("label"),
    "margin": lambda block: block.numbers("margin"),
}
COLUMNS = {"answer": "completion", "kwargs": "chat_template_kwargs"}
GOOD = {
    **{"text": "ab", "completion": "b", "messages": CHAT, "prompt": [USER], "answer": [ASSISTANT], "ids": [5, 6]},
    **{"labels": [5, 6], "tools": [{}], "kwargs": {"a": 1}, "label": True, "margin": 1.5},
}
BAD = [
    ("text", None, " must be text, not null or missing"),
    ("text", 3, " must be text, not int 3"),
    ("text", CHAT, " must be text, not list"),
    ("text", "x" * (MAX_CHARACTERS + 1), " has more than 10,000,000 characters: 10,000,001"),
    ("completion", "", " is empty"),
    ("messages", None, " must be a list of messages with role and content, not null"),
    ("messages", [], " must be a list of messages .* not an empty list"),
    ("messages", "hi", " must be a list of messages .* not str 'hi'"),
    ("messages", [[]], " must be a list of messages"),
    ("messages", [USER, 3], ": unknown role None of message 2"),
    ("messages", [{"role": "human", "content": "x"}], ": unknown role 'human' of message 1; roles are system, dev"),
    ("messages", [{"role": ["x"], "content": "x"}], r": unknown role \['x'\] of message 1"),
    ("messages", [USER, {"role": "user"}], r": the content of a message must be text, not null or missing \(message 2"),
    ("messages", [{"role": "user", "content": [1]}], r": the content of a message must be text, not list \[1\]"),
    ("messages", [{**CALL, "role": "user"}], ": the content of a message must be text, not null"),
    ("messages", [{"role": "assistant", "tool_calls": []}], ": the content of a message must be text, not null"),
    (
        "messages",
        [{**ASSISTANT, "tool_calls": "add"}],
        r": tool_calls must be a list of {function: .* not str 'add' \(",
    ),
    ("messages", [{**ASSISTANT, "tool_calls": [{"function": {}}]}], ": tool_calls must be a list"),
    ("messages", [{"role": "user", "content": "x" * (MAX_CHARACTERS + 1)}], ": the content of a message has more than"),
    ("messages", [USER, SYSTEM, ASSISTANT], ": a system message must come before all others, not as message 2"),
    ("messages", [SYSTEM, TOOL], r": a tool cannot speak first \(message 2\)"),
    ("prompt", [SYSTEM], " must have a message beside the system's"),
    ("answer", [USER, ASSISTANT], " must begin with a message of the assistant, not of 'user'"),
    ("answer", [SYSTEM, ASSISTANT], " must begin with a message of the assistant, not of 'system'"),
    ("answer", [{"role": "assistant", "content": ""}], " is empty: the assistant says nothing"),
    ("ids", None, " must be a list of whole numbers, not null"),
    ("ids", "56", " must be a list of whole numbers, not str '56'"),
    ("ids", [5, 6.5], " must be a list of whole numbers"),
    ("ids", [5, 259], r": a value is out of range 0..258, 259 at position 1 \(from 0\)"),
    ("ids", [5, -1], ": a value is out of range 0..258, -1 at position 1"),
    ("ids", [5, 10**30], ": a value is out of range 0..258"),
    ("labels", [5], " has not one value for each of input_ids: 1 for 2"),
    ("labels", [-100, -1], ": a value is out of range 0..258, -1 at position 1"),
    ("labels", [6, 7], r": a label must be its own token, .* 7 at position 1 \(from 0\), where the token is 6"),
    ("tools", "[", r" must be a list of JSON schemas, or its JSON, not str '\['"),
    ("tools", 3, " must be a list of JSON schemas"),
    ("tools", ["add"], " must be a list of JSON schemas"),
    ("kwargs", "{}", " must be an object, not str '{}'"),
    ("label", -1, " must be true or false, not int -1"),
    ("label", None, " must be true or false, not null"),
    ("margin", None, " must be a finite number, not null"),
    ("margin", float("nan"), " must be a finite number, not float nan"),
    ("margin", True, " must be a finite number, not bool True"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_or_left_out(name, value, message):
    column, read = COLUMNS.get(name, name), READERS[name]
    found = list(blocks([{column: GOOD[name]}] * 1003 + [{column: value}] + [{column: GOOD[name]}], "d.jsonl"))
    read(found[0])
    with pytest.raises(RowError, match=f"^d.jsonl, row 1004, column '{column}'{message}") as caught:
        read(found[1])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    bad_rows = BadRows("skip")
    parts = bad_rows.attempt(found[1], read)
    assert [part.place(i) for part, _ in parts for i in range(len(part))] == [
        f"d.jsonl, row {n}" for n in (1001, 1002, 1003, 1005)
    ]
    assert sum(len(result) for _, result in parts) == 4
    assert bad_rows.counts.total() == 1 and value != "x" and len(str(bad_rows)) < 120


def test_rows_that_are_skipped_are_counted_by_reason():
    rows = [{"text": "a"}, {"text": 3}, [], {"text": None}, {"text": "b"}, {"instruction": 3, "output": "x"}]
    bad_rows, texts = BadRows("skip"), []
    for block in blocks(rows, "d", bad_rows):
        for part, found in bad_rows.attempt(block, lambda block: block.texts("text")):
            texts += zip(map(part.place, range(len(part))), found, strict=True)
    assert texts == [("d, row 1", "a"), ("d, row 5", "b")]
    assert str(bad_rows) == (
        "4 rows skipped: 2 x column 'text' must be text, 1 x a row must be an object with columns, "
        "1 x column 'instruction' must be text"
    )


def test_a_dataset_of_bad_rows_only_is_an_error():
    with pytest.raises(DataError, match="d has no row that can be used; 2 rows skipped: 2 x a row must be an object"):
        list(blocks([1, 2], "d", BadRows("skip")))
    with pytest.raises(RowError, match="d, row 1: a row must be an object"):
        list(blocks([1, 2], "d"))


def test_only_a_bad_row_is_skipped():
    [block] = blocks([{"text": "a"}] * 3, "d")
    for error in (DataError("all of it"), ValueError("a fault of ours")):
        with pytest.raises(type(error)):
            BadRows("skip").attempt(block, lambda _, error=error: (_ for _ in ()).throw(error))


def test_bad_rows_cost_few_batches():
    [block] = blocks([{"text": 3 if n in (100, 700) else "a"} for n in range(1000)], "d")
    tried = []
    parts = BadRows("skip").attempt(block, lambda part: tried.append(len(part)) or part.texts("text"))
    assert sum(len(found) for _, found in parts) == 998
    assert len(tried) < 45 and sum(tried) < 6 * 1000
    tried.clear()
    with pytest.raises(RowError, match="d, row 101,"):
        BadRows("error").attempt(block, lambda part: tried.append(len(part)) or part.texts("text"))
    assert tried == [1000]


def test_garbage_in_a_cell_is_never_another_error():
    """Every reader, against everything that JSON can hold."""
    garbage = [None, True, 0, -1, 1e400, 10**40, "", "x", [], [None], [[]], [{}], {}, {"a": None}]
    garbage += [[CHAT, 3], [USER, None], [3, USER], [USER, []], [{**USER, "x": {"y": [None]}}]]
    garbage += [[{"role": value, "content": value}] for value in (None, 3, "user", [], {})]
    garbage += [[{**ASSISTANT, "tool_calls": value}] for value in (0, "x", [None], [[]], [{}], [{"function": 3}])]
    for name, read in READERS.items():
        column = COLUMNS.get(name, name)
        rows = as_rows([{column: value} for value in garbage for _ in range(2)] + [{column: GOOD[name]}], "d")
        bad_rows = BadRows("skip")
        kept = [part for block in blocks(rows, "d", bad_rows) for part, _ in bad_rows.attempt(block, read)]
        assert sum(map(len, kept)) + bad_rows.counts.total() == 2 * len(garbage) + 1
        assert kept[-1].place(len(kept[-1]) - 1) == f"d, row {2 * len(garbage) + 1}"
