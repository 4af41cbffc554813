"""Words of the command line, and of a `--config` file, to config dataclasses."""

import dataclasses
import json
import re
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jaxpost.config_file import file_words
from jaxpost.errors import ConfigError
from jaxpost.options import Group, nearest, option

OF_FLAG = re.compile(r"argument (--\w+)(?:/--[\w-]+)?: ")  # how argparse names a flag


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """What every command takes beside its own flags."""

    help_group = Group.COMMAND

    config: str | None = option(None, "YAML file with the same flags; the command line wins.")
    print_config: bool = option(False, "Print the resolved flags as a file for --config, what is changed marked.")


def parse(config_class: Any, command: str, flags: list[str]) -> Any:
    """Flags (and the file given with --config) -> an instance of the config dataclass; see `parse_all`."""
    return parse_all([config_class, FileConfig], command, flags)[0]


def parse_all(parts: Sequence[Any], command: str, flags: list[str]) -> tuple[Any, ...]:
    """Flags (and the file given with --config) -> an instance of each of the config dataclasses.

    Raises:
        ConfigError: unknown flag or key (the nearest one is named), or a value of the wrong type.
    """
    from transformers.hf_argparser import HfArgumentParser, string_to_bool

    from jaxpost.foreign import FOREIGN, settled_words

    parser = HfArgumentParser(parts, prog=f"jaxpost {command}", allow_abbrev=False)
    for action in parser._actions:
        if action.type is string_to_bool:  # bare `--bf16` is `--bf16 true`, also where the default is None
            action.nargs, action.const = "?", True
        if action.nargs == "+":  # a list may be empty
            action.nargs = "*"
        if action.type is dict:
            action.type = _mapping
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}

    def refuse(message: str) -> Any:
        message = OF_FLAG.sub(r"\1: ", message).replace("expected one argument", "it needs a value")
        raise ConfigError(f"{command}: {message}")

    parser.error = refuse
    file, flags = _take_config(flags, command)
    named = (known | FOREIGN.keys()) - {"config"}
    words = [*(file_words(Path(file), named) if file else []), *flags]
    words, nulls = _take_nulls(settled_words(words, parts[0]), parts)
    *configs, unknown = parser.parse_args_into_dataclasses(
        args=words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ConfigError(f"{command}: {_unknown(unknown, command, known)}")
    return tuple(_without(config, nulls) for config in configs)


def _unknown(words: Sequence[str], command: str, known: set[str]) -> str:
    """What an error says of words that no flag takes."""
    from jaxpost.methods import METHODS

    name = next((word for word in words if word.startswith("-")), "").partition("=")[0]
    if not name:
        return f"{words[0]!r} belongs to no flag; a value stands behind one, see jaxpost {command} --help"
    field = name.lstrip("-").replace("-", "_")
    having = [
        method.name for method in METHODS.values() if field in {each.name for each in dataclasses.fields(method.config)}
    ]
    if having and command in METHODS and command not in having:
        return f"{name} is a flag of {', '.join(having)}, not of {command}; leave it out"
    return f"unknown flag {name}{nearest(name, [f'--{flag}' for flag in known])}; see jaxpost {command} --help"


def _without(config: Any, nulls: set[str]) -> Any:
    """The config with None in these fields."""
    own = nulls & {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **dict.fromkeys(own)) if own else config


def _take_nulls(words: list[str], parts: Sequence[Any]) -> tuple[list[str], set[str]]:
    """Split `--max_length null` (or none, or with `=`) from the other words, for fields that may be None."""
    hints = [hint for part in parts for hint in get_type_hints(part).items()]
    optional = {name for name, kind in hints if type(None) in get_args(kind)}
    rest: list[str] = []
    nulls: set[str] = set()
    position = 0
    while position < len(words):
        name, equals, value = words[position].partition("=")
        taken = 1
        if not equals and position + 1 < len(words):
            value, taken = words[position + 1], 2
        name = name.removeprefix("--").replace("-", "_")
        if name in optional and words[position].startswith("--") and value.lower() in ("null", "none"):
            nulls.add(name)
            position += taken
            continue
        nulls.discard(name)  # the last one wins
        rest.append(words[position])
        position += 1
    return rest, nulls


def _mapping(text: str) -> dict[str, Any]:
    """A JSON object, which is also how the mappings of a YAML file arrive here."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r} is no JSON object, such as '{{\"key\": 1}}'")
    return value


def _take_config(flags: list[str], command: str) -> tuple[str | None, list[str]]:
    """Split `--config FILE` (or `--config=FILE`) from the other flags."""
    rest, file = [], None
    words = iter(flags)
    for word in words:
        if word == "--config":
            file = next(words, None)
            if file is None:
                raise ConfigError(f"{command}: --config needs a file")
        elif word.startswith("--config="):
            file = word.removeprefix("--config=")
        else:
            rest.append(word)
    return file, rest
