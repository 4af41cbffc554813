"""What `--help` prints: the flags of a command under their headings, as wide as the terminal."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from jaxpost.flags import Flag, shown
from jaxpost.options import Group

CLOSING = (
    "A flag without a kind of value is a switch: --flag is --flag true. A flag whose default is null takes null again, "
    "which undoes what a file says. The same names are the keys of a --config file."
)
WIDEST = 140  # characters of a line
NBSP = "\N{NO-BREAK SPACE}"  # textwrap does not break here


def print_help(
    title: str,
    about: str,
    flags: Sequence[Flag],
    subcommands: Sequence[str] = (),
    details: str = "",
    console: Console | None = None,
) -> None:
    """Print how a command is called.

    Args:
        title: the command, `plan sft` say.
        about: what it does.
        flags: in the order of their groups.
        subcommands: words that may follow it.
        details: what else there is to say.
        console: where to print; standard output by default.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    width = min(console.width, WIDEST)
    column = 8 if width < 72 else 32 if width < 100 else 44  # where what a flag means begins
    command = f"{title.split()[0]} {{{','.join(subcommands)}}}" if subcommands else title
    usage = f"usage: jaxpost {command} {'[--config FILE.yaml] [--flag value ...]' if flags else ''}"
    console.print(Text(textwrap.fill(usage, width, subsequent_indent=" " * 15, break_on_hyphens=False)))
    console.print(Text("\n" + textwrap.fill(f"{about[:1].upper()}{about[1:]}.", width)))
    if details:
        console.print(Text(f"\n{details}"))
    for group, members in groupby(flags, key=lambda flag: flag.group):
        heading = f"Flags of jaxpost {title}" if group is Group.OWN else group
        console.print(Text(f"\n{heading}", style="bold"))
        for flag in members:
            for line in _lines(flag, column, width):
                console.print(line)
    if flags:
        console.print(Text("\n" + textwrap.fill(CLOSING, width)))


def _lines(flag: Flag, column: int, width: int) -> Iterator[Text]:
    """The name of a flag on the left, its help on the right, below the name where that is long."""
    name = f"--{flag.name}"
    kind = f" {flag.kind}{' ...' if flag.is_list else ''}" if flag.kind else ""
    default = f"(default: {shown(flag.default)})".replace(" ", NBSP)
    wrapper = textwrap.TextWrapper(width - column, break_long_words=False, break_on_hyphens=False)
    lines = [line.replace(NBSP, " ") for line in wrapper.wrap(f"{flag.help} {default}")]
    left = Text("  ").append(name, "cyan").append(kind, "dim")
    if len(left) > column - 2:
        yield left
    else:
        lines, first = lines[1:], lines[0]
        yield left.append(" " * (column - len(left))).append_text(_dimmed(first))
    for line in lines:
        yield Text(" " * column).append_text(_dimmed(line))


def _dimmed(line: str) -> Text:
    text = Text(line)
    text.highlight_regex(r"\(default: .*\)$", "dim")
    return text
