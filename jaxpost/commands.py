"""The kinds of commands that there are: how the words behind one become its flags, and what runs.

What a command needs is named as `module:attribute` and imported when it is called, so that the others start fast.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, NamedTuple, Protocol

from jaxpost.options import Group, one_of, option

HELP = ("-h", "--help")
EXAMPLE = "sft"  # the method whose flags are shown where none is named


class Action(NamedTuple):
    """A command with what was said of it, its flags aside.

    Attributes:
        title: as it is called, `plan sft` say.
        parts: config dataclasses that declare its flags.
        run: what it does, given an instance of each.
        words: that are left, which are flags.
        details: for its help.
    """

    title: str
    parts: tuple[type[Any], ...]
    run: Callable[..., Any]
    words: list[str]
    details: str = ""


class Command(Protocol):
    """One line of the table of commands."""

    @property
    def about(self) -> str:
        """What it does, on one line."""
        ...

    def subcommands(self) -> tuple[str, ...]:
        """Words that may follow it."""
        ...

    def opened(self, name: str, words: list[str]) -> Action:
        """The action of the command of this name; of `--help` where a word that must follow is missing, an example.

        Raises:
            ConfigError: a word that must follow is missing or wrong.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class DryRunConfig:
    """What training takes beside the method's flags."""

    help_group = Group.COMMAND

    dry_run: bool = option(
        False, "Show config, devices, memory of a device, steps and a batch; train nothing and write nothing."
    )


@dataclass(frozen=True)
class Runs:
    """A command with flags of its own.

    Attributes:
        about: what it does.
        config: class of its flags.
        run: function of an instance of it.
        takes: the flag whose values may stand without it.
    """

    about: str
    config: str
    run: str
    takes: str | None = None

    def subcommands(self) -> tuple[str, ...]:
        return ()

    def opened(self, name: str, words: list[str]) -> Action:
        words = words if self.takes is None else behind(f"--{self.takes}", words)
        return Action(name, (resolve_name(self.config),), resolve_name(self.run), words)


def behind(flag: str, words: list[str]) -> list[str]:
    """Words with those that follow no flag behind this one; every other flag takes one word."""
    own: list[str] = []
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word == flag:
            continue
        if not word.startswith("-"):
            own.append(word)
            continue
        rest.append(word)
        if "=" not in word and word not in HELP:
            rest += [value for value in [next(left, None)] if value is not None]
    return [flag, *own, *rest] if own else rest


@dataclass(frozen=True)
class Trains:
    """The command of a method, which trains."""

    about: str

    def subcommands(self) -> tuple[str, ...]:
        return ()

    def opened(self, name: str, words: list[str]) -> Action:
        from jaxpost.methods import METHODS

        method = METHODS[name]

        def run(args: Any, asked: DryRunConfig) -> None:
            if asked.dry_run:
                resolve_name("jaxpost.dry_run:run_dry")(method, args)
            else:
                resolve_name("jaxpost.trainer:Trainer")(method, args=args).train()

        return Action(name, (method.config, DryRunConfig), run, words)


@dataclass(frozen=True)
class OfMethod:
    """A command that a method's name follows, and its flags.

    Attributes:
        about: what it does.
        run: function of the method and an instance of its config.
        config: function that makes the class of the flags of a method; by default those of the method alone.
        otherwise: where no method is named, the command that runs or the method that is meant; None where one must be.
    """

    about: str
    run: str
    config: str | None = None
    otherwise: Runs | str | None = None

    def subcommands(self) -> tuple[str, ...]:
        from jaxpost.methods import METHODS

        return tuple(METHODS)

    def opened(self, name: str, words: list[str]) -> Action:
        from jaxpost.methods import METHODS

        first = words[0] if words else ""
        if first in METHODS:
            named, words = first, words[1:]
        elif first and not first.startswith("-"):
            named = one_of(name, first, tuple(METHODS))
        elif isinstance(self.otherwise, Runs):
            return self.otherwise.opened(name, words)
        else:
            named = self.otherwise or (EXAMPLE if first in HELP else one_of(name, first, tuple(METHODS)))
        method = METHODS[named]
        part = method.config if self.config is None else resolve_name(self.config)(method)
        return Action(f"{name} {named}", (part,), lambda args: resolve_name(self.run)(method, args), words)
