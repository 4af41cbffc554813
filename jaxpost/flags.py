"""The flags of a command as its config dataclasses declare them: what help, completion and `--print_config` show."""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from jaxpost.options import Group

KINDS = {bool: "", int: "INT", float: "FLOAT", str: "TEXT", dict: "JSON"}


class Flag(NamedTuple):
    """A field of a config on the command line.

    Attributes:
        name: of the field.
        kind: of its value, in capitals; empty for a switch.
        is_list: whether it takes several values.
        default: the value without the flag.
        help: one line.
        choices: all values that it takes, where they can be counted.
        group: the heading that it belongs under.
    """

    name: str
    kind: str
    is_list: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    group: Group

    @property
    def values(self) -> tuple[str, ...]:
        """What may stand behind it, as far as that is known."""
        return self.choices or (("true", "false") if not self.kind else ())


def flags_of(parts: Iterable[type[Any]]) -> list[Flag]:
    """The flags of config dataclasses by their groups; in one, in the order in which classes are composed."""
    return sorted((flag for part in parts for flag in _of_one(part)), key=lambda flag: list(Group).index(flag.group))


def shown(value: Any) -> str:
    """A value as it stands on the command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value)) or "[]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _of_one(part: type[Any]) -> Iterator[Flag]:
    fields = {field.name: field for field in dataclasses.fields(part)}
    hints = get_type_hints(part)
    for owner in part.__mro__:
        for name in inspect.get_annotations(owner):
            if name in fields and _home(part, name) is owner:
                field = fields[name]
                kind, is_list = _kind(hints[name])
                default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
                text, group = field.metadata["help"], vars(owner).get("help_group", Group.OWN)
                kind = "NAME" if text.choices else kind
                yield Flag(name, kind, is_list, default, text.replace("%%", "%"), text.choices, group)


def _home(part: type[Any], name: str) -> type[Any]:
    """The class that first declared a field, one with a group before one without: others change its default."""
    owners = [owner for owner in part.__mro__ if name in inspect.get_annotations(owner)]
    grouped = [owner for owner in owners if "help_group" in vars(owner)]
    return (grouped or owners)[-1]


def _kind(hint: Any) -> tuple[str, bool]:
    """What a value of this type is called, and whether there may be several."""
    options = [each for each in get_args(hint) if each is not type(None)] if type(None) in get_args(hint) else [hint]
    kind = options[0]
    if get_origin(kind) is list:
        return KINDS[get_args(kind)[0]], True
    return KINDS[kind], False
