"""ShareGPT and Alpaca rows as TRL's columns."""

import pytest

from jaxpost.data.normalize import normalize
from jaxpost.data.rows import Row, RowError

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def normal(**cells):
    return normalize(Row(cells, "d, row 1")).cells


@pytest.mark.parametrize(
    "cells",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "a", "completion": "b", "system": "kept", "input": "kept"},
        {"text": "z", "instruction": "x", "input": "", "output": "y"},  # tatsu-lab/alpaca: TRL reads its text
        {"prompt": [USER], "instruction": "x", "output": "y"},
        {"instruction": "x", "answer": "y"},
        {"prompt": [{"from": "human"}]},
    ],
)
def test_other_rows_stay_as_they_are(cells):
    row = Row(cells, "d, row 1")
    assert normalize(row) == row


def test_sharegpt_becomes_messages():
    row = normalize(Row({"conversations": SHARED, "id": 3}, "d, row 1"))
    assert row == Row({"id": 3, "messages": [USER, ASSISTANT]}, "d, row 1", {"messages": "conversations"})
    assert normal(conversations=[USER, ASSISTANT]) == {"messages": [USER, ASSISTANT]}  # a name is enough, as in TRL
    assert SHARED[0] == {"from": "human", "value": "a"}, "the given row is not changed"


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("model", "assistant"),
        ("system", "system"),
        ("tool", "tool"),
        ("observation", "tool"),
        ("function", "tool"),
        ("martian", "martian"),
        (7, 7),
    ],
)
def test_sharegpt_roles(name, role):
    message = {"from": name, "value": "x", "weight": 0}
    assert normal(conversations=[message]) == {"messages": [{"role": role, "content": "x", "weight": 0}]}


def test_every_column_of_messages_may_have_from_and_value():
    for column in ("messages", "prompt", "completion", "chosen", "rejected"):
        assert normal(**{column: SHARED}) == {column: [USER, ASSISTANT]}


def test_a_sharegpt_preference_keeps_its_conversation_as_the_prompt():
    row = normal(conversations=SHARED[:1], chosen=SHARED[1], rejected={"from": "gpt", "value": "c"})
    assert row == {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "c"}]}


def test_a_sharegpt_call_of_a_function_is_a_tool_call():
    call = {"name": "add", "arguments": {"a": 1}}
    expected = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    for value in (call, [call], '{"name": "add", "arguments": {"a": 1}}', '[{"name": "add", "arguments": {"a": 1}}]'):
        assert normal(conversations=[{"from": "function_call", "value": value}]) == {"messages": [expected]}


def test_alpaca_becomes_a_prompt_and_a_completion():
    whole = {"instruction": "do", "input": "this", "output": "done", "id": 3}
    row = normalize(Row(whole, "d, row 1"))
    said = {
        "prompt": [{"role": "user", "content": "do\nthis"}],
        "completion": [{"role": "assistant", "content": "done"}],
    }
    assert row.cells == {"id": 3, **said} and row.aliases == {"prompt": "instruction", "completion": "output"}
    for without in ({"input": None}, {"input": ""}):
        assert normal(**{**whole, **without})["prompt"] == [{"role": "user", "content": "do"}]
    assert normal(instruction="do", output="done")["prompt"] == [{"role": "user", "content": "do"}]
    assert normal(**whole, history=[["q", "r"]])["prompt"][:2] == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "r"},
    ]


def test_a_system_text_becomes_the_first_message():
    system = {"role": "system", "content": "s"}
    assert normal(conversations=SHARED, system="s") == {"messages": [system, USER, ASSISTANT]}
    assert normal(instruction="a", output="b", system="s") == {"prompt": [system, USER], "completion": [ASSISTANT]}
    own = [{"from": "system", "value": "own"}, *SHARED]
    assert normal(conversations=own, system="s")["messages"][0] == {"role": "system", "content": "own"}
    for nothing in (None, ""):
        assert normal(conversations=SHARED, system=nothing) == {"messages": [USER, ASSISTANT]}


@pytest.mark.parametrize("value", ["text", None, 3, [], {}, [3], [None, SHARED[0]]])
def test_a_cell_that_is_no_sharegpt_is_left_for_the_reader_to_refuse(value):
    assert normal(conversations=value, system="s").keys() == {"messages"}


ALPACA = {"instruction": "x", "input": "y", "output": "z", "history": [["q", "r"]], "system": "s"}


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({**ALPACA, "instruction": None}, "column 'instruction' must be text, not null or missing"),
        ({**ALPACA, "instruction": 3}, "column 'instruction' must be text, not int 3"),
        ({**ALPACA, "input": ["y"]}, r"column 'input' must be text, not list \['y'\]"),
        ({**ALPACA, "output": None}, "column 'output' must be text, not null"),
        ({**ALPACA, "system": 3}, "column 'system' must be text, not int 3"),
        ({**ALPACA, "history": "qr"}, "column 'history' must be a list of pairs of texts, not str 'qr'"),
        ({**ALPACA, "history": 3}, "column 'history' must be a list of pairs"),
        ({**ALPACA, "history": [["q"]]}, "column 'history' must be a list of pairs"),
        ({**ALPACA, "history": [["q", 3]]}, "column 'history' must be a list of pairs"),
        ({"conversations": SHARED, "system": 3}, "column 'system' must be text"),
        *(
            (
                {"conversations": [{"from": "function_call", "value": value}]},
                "column 'conversations': a function_call must be JSON with a name and arguments",
            )
            for value in ("add(1)", "[]", "3", "[3]", None, "[" * 100_000)
        ),
    ],
)
def test_a_bad_cell_is_named_as_in_the_file(cells, message):
    with pytest.raises(RowError, match=f"^d, row 1, {message}"):
        normalize(Row(cells, "d, row 1"))
