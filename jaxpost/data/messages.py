"""What texts and messages must be: roles, contents, tool calls, and orders of roles that are certainly wrong."""

from collections.abc import Mapping
from typing import Any, Literal

from jaxpost.data.rows import describe, short

Part = Literal["conversation", "prompt", "completion"]

ROLES = ("system", "developer", "user", "assistant", "tool")
INSTRUCTING = ("system", "developer")
MAX_CHARACTERS = 10_000_000  # of one text: minutes and gigabytes for a tokenizer, and more than any model's context
COMPLETIONS = ("completion", "chosen", "rejected")  # columns that hold the end of a conversation


def is_conversational(value: Any) -> bool:
    """Whether a cell holds messages (a list of dicts with a role) rather than text."""
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], Mapping) and "role" in value[0]


def text_fault(value: Any) -> tuple[str, str] | None:
    """What is wrong with a text, and what was found; None if it is one."""
    if not isinstance(value, str):
        return " must be text", f", not {describe(value)}"
    if len(value) > MAX_CHARACTERS:
        return f" has more than {MAX_CHARACTERS:,} characters", f": {len(value):,}"
    return None


def messages_fault(value: Any, part: Part) -> tuple[str, str] | None:
    """What is wrong with messages, and what was found; None if a chat template may render them.

    Orders that are refused: a system (or developer) message after another, a tool's first; a prompt that ends with
    a system message; a completion that does not begin with the assistant, or says nothing. Roles need not alternate:
    that is for the template to say. A prompt may end with the assistant, who then continues.
    """
    if not is_conversational(value):
        return " must be a list of messages with role and content", f", not {describe(value)}"
    for number, message in enumerate(value, start=1):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            return ": unknown role", f" {short(role)} of message {number}; roles are {', '.join(ROLES)}"
        if fault := _content_fault(message):
            return fault[0], f"{fault[1]} (message {number})"
    return _order_fault([message["role"] for message in value], part) or (
        _silence_fault(value) if part == "completion" else None
    )


def _content_fault(message: Mapping[str, Any]) -> tuple[str, str] | None:
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or not all(map(_is_call, calls))):
        return ": tool_calls must be a list of {function: {name, arguments}}", f", not {describe(calls)}"
    if content is None and calls and message["role"] == "assistant":
        return None
    fault = text_fault(content)
    return fault and (f": the content of a message{fault[0]}", fault[1])


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _order_fault(roles: list[str], part: Part) -> tuple[str, str] | None:
    first = next((n for n, role in enumerate(roles) if role not in INSTRUCTING), len(roles))
    late = next((n for n, role in enumerate(roles) if n > first and role in INSTRUCTING), None)
    if part == "completion" and roles[0] != "assistant":
        return " must begin with a message of the assistant", f", not of {roles[0]!r}"
    if late is not None:
        return ": a system message must come before all others", f", not as message {late + 1}"
    if part == "prompt" and first == len(roles):
        return " must have a message beside the system's", ""
    if "tool" in roles[first : first + 1]:
        return ": a tool cannot speak first", f" (message {first + 1})"
    return None


def _silence_fault(value: list[Mapping[str, Any]]) -> tuple[str, str] | None:
    said = any(message.get("content") or message.get("tool_calls") for message in value)
    return None if said else (" is empty", ": the assistant says nothing")
