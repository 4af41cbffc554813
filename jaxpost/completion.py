"""`jaxpost completion SHELL`: what a shell needs to complete commands, flags and choices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxpost.commands import HELP, Action, Command
from jaxpost.errors import ConfigError
from jaxpost.flags import flags_of
from jaxpost.options import one_of
from jaxpost.parsing import FileConfig
from jaxpost.shells import SHELLS, Completed, Table

ABOUT = "print the script by which bash, zsh or fish completes commands, flags and choices"
INSTALL = """To install it, write it to a file, and open a new shell:

jaxpost completion bash > ~/.local/share/bash-completion/completions/jaxpost
jaxpost completion zsh > "${fpath[1]}/_jaxpost"
jaxpost completion fish > ~/.config/fish/completions/jaxpost.fish"""


@dataclass(frozen=True)
class Completes:
    """The command that prints a script.

    Attributes:
        commands: all that there are.
    """

    commands: Callable[[], Mapping[str, Command]]
    about: str = ABOUT

    def subcommands(self) -> tuple[str, ...]:
        return tuple(SHELLS)

    def opened(self, name: str, words: list[str]) -> Action:
        if words[:1] and words[0] in HELP:
            return Action(name, (), lambda: None, words, INSTALL)
        shell = one_of(name, words[0] if words else "", tuple(SHELLS))
        if words[1:] and words[1] not in HELP:
            raise ConfigError(f"{name} {shell} takes no more words; leave out {' '.join(words[1:])!r}")

        def run() -> None:
            print(SHELLS[shell](table_of(self.commands())))

        return Action(f"{name} {shell}", (), run, words[1:], INSTALL)


def table_of(commands: Mapping[str, Command]) -> Table:
    """What is to be completed."""
    return {name: _completed(name, command) for name, command in commands.items()}


def _completed(name: str, command: Command) -> Completed:
    subcommands = command.subcommands()
    actions = [command.opened(name, ["--help"]), *(command.opened(name, [word]) for word in subcommands)]
    flags = {action.title: flags_of([*action.parts, FileConfig]) for action in actions if action.parts}
    return Completed(command.about, subcommands, flags)
