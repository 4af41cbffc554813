"""Chat templates: conversations as text, and which characters of it the assistant says."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jaxpost.data.formats import Block
from jaxpost.data.messages import MAX_CHARACTERS
from jaxpost.data.rows import RowError
from jaxpost.data.tokenizer import default_template
from jaxpost.errors import ConfigError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
Span = tuple[int, int]  # characters of a text, from the first to before the second

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TEMPLATE_REMEDY = "give one with --chat_template_path (a .jinja file, or a model that has one)"
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field; a template that reads one gets any
# What rendering itself decides, and parameters of `apply_chat_template` that never reach a template.
RESERVED = {
    *("messages", "conversation", "conversations", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "padding"),
    *("truncation", "max_length", "return_tensors", "return_dict"),
}
_MARK = "\ue000"  # for private use


@dataclass(frozen=True)
class Chat:
    """The conversation of one row, and what its chat template is given beside the messages.

    Attributes:
        messages: with role and content.
        template: Jinja.
        variables: special tokens, `tools` and what the row's `chat_template_kwargs` say.
        block: where the row stands, with its number `i` and its `column`.
    """

    messages: Messages
    template: str
    variables: Mapping[str, Any]
    block: Block
    i: int
    column: str

    def attempt(self, messages: Messages, **ending: bool) -> str | Exception:
        """The text of these messages, or the reason for which the template refuses them.

        `ending` may be `add_generation_prompt` or `continue_final_message`.
        """
        found = self._render(messages, **ending)
        return found if isinstance(found, Exception) else found[0]

    def render(self, **options: bool) -> tuple[str, list[Span]]:
        """The text of the whole conversation, and what of it stands in {% generation %}, if asked for.

        `options` are those of `attempt`, or `return_assistant_tokens_mask`.

        Raises:
            RowError: the template refuses it, or makes too much of it.
        """
        found = self._render(self.messages, **options)
        if isinstance(found, Exception):
            raise self.error(": the chat template refuses it", f": {one_line(found)}") from found
        if len(found[0]) > MAX_CHARACTERS:
            fault = f" becomes more than {MAX_CHARACTERS:,} characters by the chat template"
            raise self.error(fault, f": {len(found[0]):,}")
        return found

    def error(self, fault: str, found: str) -> RowError:
        """What is wrong with the row's conversation."""
        return self.block.error(self.i, self.column, fault, found)

    def _render(self, messages: Messages, **options: Any) -> tuple[str, list[Span]] | Exception:
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        given = {"tools": None, **self.variables, "chat_template": self.template}
        try:
            rendered: Any = render_jinja_template([messages], **given, **options)
        except TemplateSyntaxError as error:
            raise ConfigError(f"line {error.lineno} of the chat template is not Jinja: {one_line(error)}") from error
        except Exception as error:  # a template is a program of somebody else's
            return error
        [text], spans = rendered
        return text, spans[0] if spans else []


class Renderer:
    """Renders conversations by a tokenizer's chat template; each of its warnings comes once."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer, self._warned, self._complete = tokenizer, set[str](), set[str]()

    def texts(self, block: Block, column: str, chats: Sequence[Messages], **ending: bool) -> list[str]:
        """The text of each row's messages, which `column` holds; `ending` is as for `Chat.attempt`.

        Raises:
            RowError: the template refuses a conversation, or what a row gives to it is wrong.
            ConfigError: there is no template, or it is not Jinja.
        """
        return [chat.render(**ending)[0] for chat in self._chats(block, column, chats)]

    def spans(
        self, block: Block, column: str, chats: Sequence[Messages], first: Sequence[int]
    ) -> tuple[list[str], list[list[Span]]]:
        """As `texts`, and which characters the assistant says, in messages from number `first` of each row on.

        That is what stands in {% generation %}, of all messages; without it, the template is tried turn by turn.
        """
        texts, spans = [], []
        for chat, number in zip(self._chats(block, column, chats), first, strict=True):
            marked = GENERATION.search(chat.template) is not None
            text, found = chat.render(return_assistant_tokens_mask=marked)
            found = found if marked else list(_Turns(chat, text, self._special).spans(number))
            self._warn_of_untrained_end(text, found)
            texts.append(text)
            spans.append(found)
        return texts, spans

    def warn_of_unused(self, block: Block, column: str, chats: Sequence[Messages]) -> None:
        """Say which fields of the rows have no effect, since the template does not mention them."""
        kwargs = block.template_kwargs()
        for chat in self._chats(block, column, chats):
            fields: dict[tuple[str, ...], str] = {(name,): "chat_template_kwargs" for name in kwargs[chat.i]}
            if chat.variables["tools"]:
                fields[("tools",)] = "tools"
            for names in (("tool_calls",), REASONING):
                if any(message.get(name) for name in names for message in chat.messages):
                    fields[names] = column
            for names, where in fields.items():
                if not any(name in chat.template for name in names):
                    found = f"{block.where(chat.i, where)}: the chat template does not use {names[0]!r}"
                    self._warn(names[0], f"{found}, so it has no effect, here and in other rows")

    @cached_property
    def _special(self) -> tuple[str, ...]:
        """The special tokens, longest first."""
        added = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        return tuple(sorted({*added, *self._tokenizer.all_special_tokens} - {""}, key=len, reverse=True))

    def _chats(self, block: Block, column: str, chats: Sequence[Messages]) -> Iterator[Chat]:
        special: Mapping[str, Any] = self._tokenizer.special_tokens_map
        rows = zip(chats, block.tools(), block.template_kwargs(), strict=True)
        for i, (messages, tools, kwargs) in enumerate(rows):
            for name in kwargs:
                if name in RESERVED or not isinstance(name, str):
                    fault = f" must not set {name!r}, which is not for the template"
                    raise block.error(i, "chat_template_kwargs", fault)
            chat = Chat(messages, self._template(tools), {**special, "tools": tools, **kwargs}, block, i, column)
            self._check_complete(chat)
            yield chat

    def _template(self, tools: Any) -> str:
        """The tokenizer's template, as transformers chooses it among several."""
        named = self._tokenizer.chat_template
        if tools is not None and isinstance(named, dict) and "tool_use" in named:
            return named["tool_use"]
        template = default_template(self._tokenizer)
        if template is None:
            raise ConfigError(f"the tokenizer has no chat template, and the rows hold messages; {TEMPLATE_REMEDY}")
        return template

    def _check_complete(self, chat: Chat) -> None:
        """Raise if the template leaves out what messages say, as one for images does where that is no list of parts."""
        if chat.template not in self._complete:
            found = chat.attempt([{**message, "content": _MARK} for message in chat.messages])
            if isinstance(found, str) and _MARK not in found:
                remedy = "; give another one with --chat_template_path"
                raise chat.error(": the chat template leaves out what the messages say", remedy)
            self._complete.add(chat.template)

    def _warn_of_untrained_end(self, text: str, spans: list[Span]) -> None:
        inner = {start for start, _ in spans}
        ends = (end for _, end in spans if end not in inner and not text[:end].rstrip().endswith(self._special))
        for token in filter(None, (_leading(text[end:], self._special).strip() for end in ends)):
            found = f"the chat template writes {token!r} after what is trained of the assistant's turn"
            self._warn("end", f"{found}; if that is what ends it, the model will not learn to stop")

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            logger.warning(message)
        self._warned.add(key)


@dataclass(frozen=True)
class _Turns:
    """Where messages begin and end in the text of a conversation, from rendering what comes before them.

    A beginning of the conversation mostly renders as a beginning of its text. Some templates write an earlier turn in
    another way once more messages follow (Qwen 3 leaves out its thoughts, gpt-oss ends it by another token). There, a
    mark that stands nowhere else is put into the message, and is looked for.
    """

    chat: Chat
    text: str
    special: tuple[str, ...]

    def spans(self, first: int) -> Iterator[Span]:
        """What the assistant says from message `first` on: from where generation would start, with the end token."""
        end = 0
        for i, message in enumerate(self.chat.messages):
            if message["role"] == "assistant" and i >= first:
                floor, start, end = end, self._start(i, end), self._end(i)
                if not floor <= start <= end:
                    raise self._untold(i)
                yield start, end

    def _start(self, i: int, floor: int) -> int:
        """Where generation would start the message; not before `floor`."""
        past = self.chat.messages[:i]
        prompt = self.chat.attempt(past, add_generation_prompt=True) if past else None
        if not isinstance(prompt, str):
            return self._start_without_prompt(i, floor)
        if self.text.startswith(prompt):
            return len(prompt)
        begin, start = self._end(i - 1), _shared(prompt, self.text)
        if start < begin:  # the messages before are written differently
            before = self.chat.attempt(past)
            if not isinstance(before, str) or not prompt.startswith(before):
                raise self._untold(i)
            start = begin + _shared(prompt[len(before) :], self.text[begin:])
        # What the prompt ends with (`<think>`) may have its first characters in common with the message (`<b>`).
        return min(start, max(begin, self._first_said(i)))

    def _start_without_prompt(self, i: int, floor: int) -> int:
        """The start of a message that no prompt stands before: of the first, or where the template wants a user."""
        said, probe = self._first_said(i), [*self.chat.messages[:i], {"role": "user", "content": "x"}]
        before, prompt = self.chat.attempt(probe), self.chat.attempt(probe, add_generation_prompt=True)
        if isinstance(before, str) and isinstance(prompt, str) and prompt.startswith(before):
            header = prompt[len(before) :]
            found = self.text.rfind(header, floor, said)
            return said if found < 0 else found + len(header)
        return said

    def _first_said(self, i: int) -> int:
        """The first character that would be another if message `i` said something else."""
        messages = self.chat.messages
        kept = {key: value for key, value in messages[i].items() if key not in ("tool_calls", *REASONING)}
        found = self.chat.attempt([*messages[:i], {**kept, "content": self.mark}, *messages[i + 1 :]])
        if isinstance(found, Exception):
            raise self._untold(i)
        return _shared(found, self.text)

    def _end(self, i: int) -> int:
        """Where the message ends, with what the template writes after it."""
        if i + 1 == len(self.chat.messages):
            return len(self.text)
        through = self.chat.attempt(self.chat.messages[: i + 1])
        if isinstance(through, str) and self.text.startswith(through):
            return len(through)
        end = self._end_by_mark(i)
        # Gemma 4 writes what a tool says into the message that calls it.
        inserted = self.chat.messages[i + 1]["role"] == "tool" and self._first_said(i + 1) < (end or 0)
        if end is None or inserted:
            raise self._untold(i)
        return end

    def _end_by_mark(self, i: int) -> int | None:
        """The end of a message that the template writes differently once others follow; None if it cannot be told."""
        for marked in _with_mark(self.chat.messages[i], self.mark):
            messages = [*self.chat.messages[:i], marked, *self.chat.messages[i + 1 :]]
            before, rest = self._parted(messages) or ("", "")
            if before + rest == self.text:
                end, alone = len(before), self._parted(messages[: i + 1])
                if alone and rest.startswith(alone[1]):
                    return end + len(alone[1])
                token = _leading(rest, self.special)
                # White space after the token belongs to the turn if it is there too when nothing follows.
                blank = rest[len(token) : _shared(alone[1], rest)] if alone else ""
                return end + len(token) + len(blank) - len(blank.lstrip()) if token else None
        return None

    def _parted(self, messages: Messages) -> tuple[str, str] | None:
        """The text of messages before and after the mark that is in them; None if that does not come out."""
        found = self.chat.attempt(messages)
        if isinstance(found, Exception) or self.mark not in found:
            return None
        before, _, after = found.partition(self.mark)
        return before, after.replace(self.mark, "")

    @cached_property
    def mark(self) -> str:
        """A character that the text does not have."""
        return next(mark for code in range(ord(_MARK), 0xF900) if (mark := chr(code)) not in self.text)

    def _untold(self, i: int) -> RowError:
        found = f" (message {i + 1}, {self.chat.messages[i]['role']})"
        remedy = "give a template with {% generation %} by --chat_template_path"
        return self.chat.error(
            ": the chat template does not show where a message begins and ends", f"{found}; {remedy}"
        )


def _with_mark(message: dict[str, Any], mark: str) -> Iterator[dict[str, Any]]:
    """The message with a mark in it: in the name of the last tool that it calls, or at the end of its content."""
    if message.get("tool_calls"):
        *calls, last = message["tool_calls"]
        function = last.get("function", last)
        named = {**function, "name": function["name"] + mark}
        yield {**message, "tool_calls": [*calls, {**last, "function": named} if "function" in last else named]}
    content = message.get("content") or ""
    end = len(content.rstrip())  # a template may strip it
    yield {**message, "content": content[:end] + mark + content[end:]}


def _leading(text: str, tokens: Sequence[str]) -> str:
    """The first of the tokens that a text begins with, and the white space before it; empty if there is none."""
    bare = text.lstrip()
    token = next((token for token in tokens if bare.startswith(token)), "")
    return text[: len(text) - len(bare) + len(token)] if token else ""


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common, by bisection: they may be long."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if other.startswith(one[low:middle], low) else (low, middle - 1)
    return low
