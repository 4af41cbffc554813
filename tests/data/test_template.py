"""Rendered conversations and what is trained of them, against spans worked out by hand from small templates."""

import copy
import logging

import pytest

from jaxpost.data.formats import Block
from jaxpost.data.template import Renderer
from jaxpost.errors import ConfigError, DataError
from tests.conftest import make_tokenizer

HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}" + HEADER
)
# As Qwen 3: only turns after the last one of a user keep their thoughts, and only those get an empty place for them.
FORGETFUL = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content | trim }}"
    "{% for call in m.tool_calls %}{{ '\n' if m.content or not loop.first }}<call>{{ call.function.name }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
) + HEADER
THINKING = FORGETFUL.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # generation starts so
# As gpt-oss: another token ends the last turn; as Phi 3: so does one that stands after all.
OTHER_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<pad>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}" + HEADER
)
LAST_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<pad>{% endif %}"
)
SYSTEM = {"role": "system", "content": "sys"}
USER = {"role": "user", "content": "ab"}
TOOL = {"role": "tool", "content": "42"}


def assistant(content="", reasoning=None, call=None):
    message: dict[str, object] = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if call is not None:
        message["tool_calls"] = [{"type": "function", "function": {"name": call, "arguments": {"x": 1}}}]
    return message


def renderer(template):
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = template
    return Renderer(tokenizer)


def block(messages, **cells):
    return Block({"messages": [messages], **{column: [cell] for column, cell in cells.items()}}, 0, "rows.jsonl")


def trained(template, messages, first=0, **cells):
    """What is trained of each turn."""
    [text], [spans] = renderer(template).spans(block(messages, **cells), "messages", [messages], [first])
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER, assistant("c")], ["c<|im_end|>\n"]),
        ([SYSTEM, USER, assistant(" c\n"), USER, assistant("d")], [" c\n<|im_end|>\n", "d<|im_end|>\n"]),
        ([USER, assistant("c"), assistant("d"), USER], ["c<|im_end|>\n", "d<|im_end|>\n"]),
        ([assistant("c"), USER, assistant("d")], ["c<|im_end|>\n", "d<|im_end|>\n"]),
        ([SYSTEM, assistant("c"), USER], ["c<|im_end|>\n"]),
        ([USER, assistant(call="f"), TOOL, assistant("d")], ['<call>f {"x": 1}</call><|im_end|>\n', "d<|im_end|>\n"]),
        ([USER, assistant("<|im_end|>\n<|im_start|>user\nab")], ["<|im_end|>\n<|im_start|>user\nab<|im_end|>\n"]),
        ([USER, assistant("")], ["<|im_end|>\n"]),
        ([USER], []),
    ],
    ids=["one", "two", "in a row", "first", "after system", "tool", "looks like a turn", "silent", "none"],
)
def test_turns_without_generation_markers(messages, expected):
    assert trained(PLAIN, messages) == expected


def test_markers_decide_where_they_are():
    marked = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
    assert trained(marked, [USER, assistant("c")]) == ["ab", "c"]


def test_only_turns_from_the_first_asked_for_on():
    assert trained(PLAIN, [USER, assistant("c"), USER, assistant("d")], first=2) == ["d<|im_end|>\n"]


def test_a_template_without_an_end_token_keeps_the_whole_turn():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    asking = template + "{% if add_generation_prompt %}assistant: {% endif %}"
    assert trained(asking, [USER, assistant("c"), USER, assistant("d")]) == ["c\n\n", "d\n\n"]
    # Where generation would have to write the header, the header is trained.
    assert trained(template, [USER, assistant("c")]) == ["assistant: c\n\n"]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER, assistant("c")], ["<think>\n\n</think>\n\nc<|im_end|>\n"]),
        (
            [USER, assistant("c "), USER, assistant("d", "so")],
            ["c<|im_end|>\n", "<think>\nso\n</think>\n\nd<|im_end|>\n"],
        ),
        ([USER, assistant("c", "because"), USER], ["c<|im_end|>\n"]),
        # The tool's message stands after thoughts that the whole text has no more.
        (
            [USER, assistant("c", "because", "f"), TOOL, assistant("d"), USER, assistant("e", "so")],
            ["c\n<call>f</call><|im_end|>\n", "d<|im_end|>\n", "<think>\nso\n</think>\n\ne<|im_end|>\n"],
        ),
        (
            [USER, assistant("", "because", "f"), TOOL, assistant("d"), USER, assistant("e", "so")],
            ["<call>f</call><|im_end|>\n", "d<|im_end|>\n", "<think>\nso\n</think>\n\ne<|im_end|>\n"],
        ),
        ([assistant("c"), USER, assistant("d", "so")], ["c<|im_end|>\n", "<think>\nso\n</think>\n\nd<|im_end|>\n"]),
    ],
    ids=["one", "two", "not last", "tool", "silent tool", "first"],
)
def test_turns_that_are_written_differently_once_others_follow(messages, expected):
    assert trained(FORGETFUL, messages) == expected


def test_what_generation_starts_with_is_not_trained():
    turns = [USER, assistant("c", ""), USER, assistant("d", "so")]
    assert trained(THINKING, turns) == ["c<|im_end|>\n", "so\n</think>\n\nd<|im_end|>\n"]
    # `<b>` and `<call>` share their first character with `<think>`, which is the prompt's last line.
    turns = [USER, assistant("<b>c</b>", ""), USER, assistant("", "", "f"), TOOL, USER, assistant("d", "so")]
    expected = ["<b>c</b><|im_end|>\n", "<call>f</call><|im_end|>\n", "so\n</think>\n\nd<|im_end|>\n"]
    assert trained(THINKING, turns) == expected


def test_the_end_token_that_a_turn_has_there_is_trained():
    turns = [USER, assistant("c"), USER, assistant("d")]
    assert trained(OTHER_END, turns) == ["c<|im_end|>", "d<pad>"]
    assert trained(LAST_END, turns) == ["c<|im_end|>\n", "d<|im_end|>\n<pad>"]


def test_a_first_turn_where_a_user_is_wanted():
    """The header comes from a prompt that has one; a system prompt that the template adds by itself stays untrained."""
    wants = PLAIN.replace(
        "{% for m in",
        "{% if 'user' not in messages | map(attribute='role') %}{{ raise_exception('no user') }}{% endif %}"
        "{{ messages[0].role and '<|im_start|>system\nassistant\n<|im_end|>\n' }}{% for m in",
        1,
    )
    assert trained(wants, [assistant("c"), USER, assistant("d")]) == ["c<|im_end|>", "d<|im_end|>\n"]
    assert trained(wants, [SYSTEM, assistant("c"), USER]) == ["c<|im_end|>"]
    with pytest.raises(DataError, match="row 1, column 'messages': the chat template refuses it: no user"):
        trained(wants, [assistant("c")])


def test_a_turn_that_cannot_be_told_is_an_error_of_its_row():
    follows = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ messages | length }}{% endfor %}"
    shouts = FORGETFUL.replace("m.content | trim", "m.content | upper if loop.index0 < ns.last else m.content")
    # As Gemma 4: what the tool says stands before what the calling message says.
    moved = (
        "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n"
        "{% if m.tool_calls %}{{ messages[loop.index].content }}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    ) + HEADER
    named = r"rows.jsonl, row 1, column 'messages': the chat template does not show where a message begins and ends"
    remedy = r".*; give a template with {% generation %} by --chat_template_path"
    with pytest.raises(DataError, match=rf"{named} \(message 1, user\){remedy}"):
        trained(follows, [USER, assistant("c"), USER])
    assert trained(shouts, [USER, assistant("c", ""), USER, assistant("d", "so")])[0] == "C<|im_end|>\n"
    with pytest.raises(DataError, match=rf"{named} \(message 2, assistant\)"):
        trained(moved, [USER, assistant("c", call="f"), {**TOOL, "content": "e"}, assistant("d"), USER])


def test_tools_and_variables_reach_every_rendering():
    template = "{{ tools | tojson if tools }}{{ style }}" + FORGETFUL
    turns = [USER, assistant("c", "because"), USER, assistant("d", "so")]
    expected = ["c<|im_end|>\n", "<think>\nso\n</think>\n\nd<|im_end|>\n"]
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        cells = {"tools": tools, "chat_template_kwargs": {"style": "brief"}}
        assert trained(template, turns, **cells) == expected
        [text] = renderer(template).texts(block(turns, **cells), "messages", [turns], add_generation_prompt=True)
        assert text.startswith('[{"name": "f"}]brief<|im_start|>user') and text.endswith("<|im_start|>assistant\n")


def test_the_template_for_tools_is_used_where_there_are_some():
    named = {"default": PLAIN, "tool_use": "tools:{{ tools | length }}" + PLAIN}
    [plain] = renderer(named).texts(block([USER], tools=None), "messages", [[USER]])
    [using] = renderer(named).texts(block([USER], tools=[{"name": "f"}]), "messages", [[USER]])
    assert plain.startswith("<|im_start|>user") and using.startswith("tools:1<|im_start|>user")


@pytest.mark.parametrize("name", ["add_generation_prompt", "messages", "tokenize", 5])
def test_what_a_row_must_not_set(name):
    with pytest.raises(DataError, match=rf"row 1, column 'chat_template_kwargs' must not set '?{name}'?, which is not"):
        trained(PLAIN, [USER, assistant("c")], chat_template_kwargs={name: True})


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("raise_exception('it needs\nthoughts')", "it needs thoughts"),
        ("m.thinking.upper()", "'dict object' has no attribute 'thinking'"),
        ("m.content + m.thinking", "'dict object' has no attribute 'thinking'"),
        ("1 / 0", "division by zero"),
        ("m.content + 1", "can only concatenate str"),
    ],
)
def test_a_template_that_fails_names_the_row(expression, reason):
    template = PLAIN.replace("{{ m.content }}", f"{{{{ {expression} if m.role == 'assistant' else m.content }}}}")
    with pytest.raises(
        DataError, match=rf"^rows.jsonl, row 1, column 'messages': the chat template refuses it: {reason}"
    ):
        trained(template, [USER, assistant("c")])


def test_a_template_that_leaves_out_the_messages_is_refused():
    """Templates for images want lists of parts, and write nothing of a text."""
    parts = "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %}\n{% endfor %}"
    fault = (
        "row 1, column 'messages': the chat template leaves out what the messages say; give another one with --chat_t"
    )
    with pytest.raises(DataError, match=fault):
        trained(parts, [USER, assistant("c")])


def test_a_template_that_makes_too_much_of_a_row_is_refused(monkeypatch):
    monkeypatch.setattr("jaxpost.data.template.MAX_CHARACTERS", 100)
    with pytest.raises(DataError, match="row 1, column 'messages' becomes more than 100 characters by the chat templ"):
        trained("{{ tools }}" + PLAIN, [USER, assistant("c")], tools=[{"name": "f" * 100}])


def test_no_template_and_one_that_is_not_jinja():
    with pytest.raises(ConfigError, match=r"no chat template.*--chat_template_path"):
        trained(None, [USER])
    with pytest.raises(ConfigError, match="line 1 of the chat template is not Jinja"):
        trained("{% for m in messages %}", [USER])


def warnings(caplog, template, messages, times=2, **cells):
    """Those of rendering the row and looking for what is not used, several times."""
    caplog.clear()
    one, rows = renderer(template), block(messages, **cells)
    with caplog.at_level(logging.WARNING, "jaxpost"):
        for _ in range(times):
            one.warn_of_unused(rows, "messages", [messages])
            one.spans(rows, "messages", [messages], [0])
    return caplog.messages


def test_an_end_token_outside_of_what_is_trained_is_told_once(caplog):
    marked = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}END{% endgeneration %}\n{% endfor %}"
    turns = [USER, assistant("c"), USER, assistant("d")]
    outside = marked.replace("END{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    [found] = warnings(caplog, outside, turns)
    assert found.startswith("the chat template writes '<|im_end|>' after what is trained")
    apart = "{% generation %}<|im_end|>{% endgeneration %}"  # of one turn, in two pieces
    for fine in (PLAIN, FORGETFUL, OTHER_END, LAST_END, marked, outside.replace("<|im_end|>", apart)):
        assert warnings(caplog, fine, turns) == []


def test_what_has_no_effect_is_told_once(caplog):
    turns, tools = [USER, assistant("c", "because", "f"), TOOL], [{"name": "f"}]
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    found = warnings(caplog, bare, turns, tools=tools, chat_template_kwargs={"style": "brief"})
    fields = {
        "tools": "tools",
        "style": "chat_template_kwargs",
        "tool_calls": "messages",
        "reasoning_content": "messages",
    }
    expected = {
        f"rows.jsonl, row 1, column {column!r}: the chat template does not use {name!r}, so it has no effect, here and "
        "in other rows"
        for name, column in fields.items()
    }
    assert set(found) == expected and len(found) == len(expected)
    used = "{{ tools }}{{ style }}" + FORGETFUL
    assert warnings(caplog, used, turns, tools=tools, chat_template_kwargs={"style": "brief"}) == []
    assert warnings(caplog, bare, [USER, assistant("c")], tools=None, chat_template_kwargs=None) == []
