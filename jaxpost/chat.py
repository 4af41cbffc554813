"""`jaxpost chat`: talk with a model, in a terminal or a message a line."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from jaxpost.completer import AnswerConfig, Completer, LoadConfig, room
from jaxpost.data.chat import encode_prompt
from jaxpost.data.tokenizer import default_template
from jaxpost.errors import ConfigError, JaxpostError
from jaxpost.options import check_parts, nearest, option
from jaxpost.spoken import Spoken
from jaxpost.writing import write_lines

LOOK_STEPS = 4  # tokens after which what was drawn is shown
COMMANDS = ("/clear", "/system", "/save", "/exit")
HELP = "/clear, /system TEXT, /save FILE, /exit; Ctrl-C stops an answer"


@dataclass(frozen=True, kw_only=True)
class ChatConfig(LoadConfig, AnswerConfig):
    """Flags of `jaxpost chat`."""

    system: str | None = option(None, "System prompt.")
    chat_template_kwargs: dict | None = option(
        None, """More for the chat template, as JSON: '{"enable_thinking": false}'."""
    )
    temperature: float = option(0.7, "Softmax temperature; 0 is greedy.")
    max_new_tokens: int = option(512, "Longest answer, in tokens.")

    def __post_init__(self) -> None:
        check_parts(self)


class TooLongError(JaxpostError):
    """A message that the model cannot read at once."""


class Conversation:
    """What was said, and how much of it the model still reads.

    Args:
        encode: messages, or a text where there is no chat template -> ids.
        room: tokens that a prompt may have.
        has_template: whether the model reads messages; without, each is a text that it goes on with.

    Attributes:
        system: the system prompt.
        messages: of the user and the assistant in turns, from the first one.
        first: number of the first message that the model still reads.
    """

    def __init__(self, encode: Callable[[Any], np.ndarray], room: int, has_template: bool):
        self._encode, self._room, self.has_template = encode, room, has_template
        self.system: str | None = None
        self.clear()

    def clear(self) -> None:
        """Forget what was said, but not the system prompt."""
        self.messages: list[dict[str, str]] = []
        self.first = 0

    def instruct(self, system: str | None) -> None:
        """Take another system prompt, or none.

        Raises:
            ConfigError, DataError: the chat template cannot use it; nothing has changed.
        """
        if system is not None and not self.has_template:
            raise ConfigError("the model has no chat template, so a system prompt has no place; leave it out")
        if system is not None:
            self._encode([*_instructed(system), {"role": "user", "content": "x"}])
        self.system = system

    def whole(self) -> list[dict[str, str]]:
        """All messages, that of the system first."""
        return [*_instructed(self.system), *self.messages]

    def prompt(self, text: str) -> np.ndarray:
        """What the model reads to answer a message; where there is no room, without the oldest turns from now on.

        Raises:
            TooLongError: there is no room for the message alone.
            ConfigError, DataError: the chat template cannot use it.
        """
        if not self.has_template:
            return self._fitting(self._encode(text))
        self.messages.append({"role": "user", "content": text})
        first, last = self.first, len(self.messages) - 1
        try:
            while True:
                tokens = self._encode([*_instructed(self.system), *self.messages[first:]])
                if len(tokens) <= self._room or first == last:
                    break
                first += 2
            self._fitting(tokens)
        except JaxpostError:
            self.messages.pop()
            raise
        self.first = first
        return tokens

    def answered(self, text: str) -> None:
        """Keep an answer; a message that got none is forgotten."""
        if not self.has_template:
            return
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def _fitting(self, tokens: np.ndarray) -> np.ndarray:
        if len(tokens) > self._room:
            raise TooLongError(
                f"that message has {len(tokens):,} tokens with what stands around it, and there is room for "
                f"{self._room:,}; shorten it"
            )
        return tokens


def _instructed(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


class Chat:
    """A conversation with a model.

    Args:
        config: the flags.

    Raises:
        ConfigError: a flag or the model cannot be used.
    """

    def __init__(self, config: ChatConfig):
        self.config, self.completer = config, Completer(config, "chat")
        limit = room(self.completer.max_positions, config.max_new_tokens)
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        has_template = default_template(self.completer.tokenizer) is not None
        self.conversation = Conversation(self._encode, limit, has_template)
        self.conversation.instruct(config.system)
        self._answers = 0

    def take(self, line: str) -> bool:
        """Do what a line says; whether the chat goes on."""
        if not line.strip():
            return True
        if line.startswith("/"):
            return self._command(line.strip())
        before = self.conversation.first
        try:
            prompt = self.conversation.prompt(line.strip())
        except JaxpostError as error:
            self.note(str(error))
            return True
        if self.conversation.first > before:
            turns = self.conversation.first // 2
            self.note(
                f"the model's {self.completer.max_positions:,} tokens are full: it no longer reads the oldest "
                f"{'turn' if turns == 1 else f'{turns} turns'}"
            )
        self.conversation.answered(self._answer(prompt))
        return True

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        self._console.print(f"[{text}]", style="dim", markup=False)

    def _answer(self, prompt: np.ndarray) -> str:
        """What the model says, which is shown as it is drawn; Ctrl-C stops it."""
        spoken, config = Spoken(self.completer.text, self.is_terminal), self.config
        if self.is_terminal and not self._answers:
            self.note("compiling; later answers come sooner")
        self._answers += 1
        try:
            [completion] = self.completer.complete(
                [prompt], config, first_request=self._answers, stop=spoken, stop_steps=LOOK_STEPS, roomy=True
            )
            spoken(completion.tokens)
            end = "" if completion.ended else f"cut after {config.max_new_tokens} tokens; --max_new_tokens takes more"
        except KeyboardInterrupt:
            if not self.is_terminal:
                raise
            end = "stopped"
        spoken.close()
        if end:
            self.note(end)
        return spoken.text

    def _encode(self, prompt: Any) -> np.ndarray:
        kwargs = self.config.chat_template_kwargs if not isinstance(prompt, str) else None
        options = {"vocab_size": self.completer.vocab_size, "chat_template_kwargs": kwargs, "name": "the chat"}
        return encode_prompt(prompt, self.completer.tokenizer, **options)

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            if name == "/exit":
                return False
            if name == "/clear":
                self.conversation.clear()
                self.note("what was said is forgotten")
            elif name == "/system":
                self.conversation.instruct(rest or None)
                self.note("another system prompt" if rest else "no system prompt; /system TEXT gives one")
            elif name == "/save" and rest:
                messages = self.conversation.whole()
                write_lines(rest, [json.dumps({"messages": messages}, ensure_ascii=False)])
                self.note(f"{len(messages)} messages in {rest}")
            elif name == "/save":
                self.note("/save FILE needs a file")
            else:
                self.note(f"no command {name}{nearest(name, COMMANDS)}; {HELP}; a message may begin with a space")
        except JaxpostError as error:
            self.note(str(error))
        return True


def run_chat(config: ChatConfig) -> None:
    """Answer messages until there are no more.

    Raises:
        ConfigError: a flag or the model cannot be used.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # what a pipe carries may not be UTF-8
            stream.reconfigure(errors="replace")
    chat = Chat(config)
    chat.completer.load()
    if not chat.conversation.has_template:
        chat.note("the model has no chat template: it goes on with each text by itself, and answers no messages")
    if chat.is_terminal:
        chat.note(f"{config.model_name_or_path}: reads {chat.completer.max_positions:,} tokens")
        chat.note(HELP)
    for line in _typed(chat) if chat.is_terminal else sys.stdin:
        if not chat.take(line.rstrip("\n")):
            return


def _typed(chat: Chat) -> Iterator[str]:
    """The lines that a user types, until Ctrl-D."""
    import readline  # noqa: F401  # what makes `input` edit lines and remember them

    while True:
        try:
            yield input("\n> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            chat.note("Ctrl-D or /exit ends the chat")
