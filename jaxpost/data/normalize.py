"""Rows of ShareGPT and Alpaca as rows with TRL's columns, one at a time."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpost.data.rows import Row, cell_error, describe

MESSAGE_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")
TYPED_COLUMNS = {*MESSAGE_COLUMNS, "text", "input_ids"}
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
}
FUNCTION_CALL = "function_call"  # an assistant's message whose value is the call in JSON


def normalize(row: Row) -> Row:
    """A row with the columns that TRL reads; one that has them already stays as it is.

    - ShareGPT: `conversations` become `messages`, or the `prompt` beside `chosen`; messages with `from` and `value`, in
      any column, get `role` and `content`, roles as in SHAREGPT_ROLES and a call in JSON as `tool_calls`.
    - Alpaca: `instruction`, `input` (optional) and `output` become the `prompt` and the `completion` of a conversation.
      The user says the instruction and, on a new line, the input, as in LLaMA-Factory: the headings of Stanford's own
      template would stand inside of the model's chat template. `history` (pairs of texts) goes before. A row that has
      one of TRL's columns too (tatsu-lab/alpaca has `text`) is of that type.
    - The `system` text of either becomes the first message.

    Raises:
        RowError: a cell is not what these formats say.
    """
    if "conversations" in row.cells:
        target = "prompt" if "chosen" in row.cells else "messages"
        row = _replace(row, ["conversations"], **{target: row.cells["conversations"]})
        row = row._replace(aliases={target: "conversations"})
    elif "instruction" in row.cells and "output" in row.cells and TYPED_COLUMNS.isdisjoint(row.cells):
        row = _alpaca(row)
    found = {c: row.cells[c] for c in MESSAGE_COLUMNS if c in row.cells and _is_sharegpt(row.cells[c])}
    if found:
        row = _replace(row, [], **{column: _messages(value, row, column) for column, value in found.items()})
    return _with_system(row, next(iter(row.aliases))) if row.aliases and "system" in row.cells else row


def _replace(row: Row, dropped: Sequence[str], **added: Any) -> Row:
    return row._replace(cells={**{c: cell for c, cell in row.cells.items() if c not in dropped}, **added})


def _alpaca(row: Row) -> Row:
    turns = [_text(row, "instruction"), "" if row.cells.get("input") is None else _text(row, "input")]
    prompt = [*_history(row), {"role": "user", "content": "\n".join(filter(None, turns))}]
    completion = [{"role": "assistant", "content": _text(row, "output")}]
    dropped = ("instruction", "input", "output", "history")
    aliases = {"prompt": "instruction", "completion": "output"}
    return _replace(row, dropped, prompt=prompt, completion=completion)._replace(aliases=aliases)


def _history(row: Row) -> list[dict[str, str]]:
    pairs = row.cells.get("history") or []
    whole = isinstance(pairs, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    if not whole or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise cell_error(row.place, "history", " must be a list of pairs of texts", f", not {describe(pairs)}")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _with_system(row: Row, column: str) -> Row:
    """The row with its `system` text before the messages of `column`, where these have none of their own."""
    messages = row.cells[column]
    if row.cells["system"] in (None, "") or not isinstance(messages, list):
        return _replace(row, ["system"])
    system = {"role": "system", "content": _text(row, "system")}
    has_own = any(isinstance(message, Mapping) and message.get("role") == "system" for message in messages[:1])
    return _replace(row, ["system"], **({} if has_own else {column: [system, *messages]}))


def _is_sharegpt(value: Any) -> bool:
    """Whether a cell holds a message with `from` and `value`, or a list of them."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and "from" in first and "value" in first


def _messages(value: Any, row: Row, column: str) -> list[Any]:
    messages = value if isinstance(value, list) else [value]
    return [_message(m, row, column) if isinstance(m, Mapping) and "from" in m else m for m in messages]


def _message(message: Mapping[str, Any], row: Row, column: str) -> dict[str, Any]:
    role, content = message["from"], message.get("value")
    others = {key: item for key, item in message.items() if key not in ("from", "value")}
    if role == FUNCTION_CALL:
        calls = _tool_calls(content, row, column)
        return {"role": "assistant", "tool_calls": calls, **others}
    return {"role": SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role, "content": content, **others}


def _tool_calls(content: Any, row: Row, column: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        value = None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        fault = f": a {FUNCTION_CALL} must be JSON with a name and arguments"
        raise cell_error(row.place, row.aliases.get(column, column), fault, f", not {describe(content)}")
    return [{"type": "function", "function": call} for call in calls]


def _text(row: Row, column: str) -> str:
    value = row.cells[column]
    if not isinstance(value, str):
        raise cell_error(row.place, column, " must be text", f", not {describe(value)}")
    return value
