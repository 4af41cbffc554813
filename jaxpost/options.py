"""How a config field is declared: once, with its default and its help, beside the code that reads it."""

import dataclasses
import difflib
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from jaxpost.errors import ConfigError

# Short names of flags that are near to none by their letters.
MEANT = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "lora_rank": "lora_r",
}


class Group(StrEnum):
    """The headings of `--help`, in their order; a part of a config names its own as `help_group`.

    The fields of a part without one are the command's own.
    """

    PLAN = "Plan"
    OWN = "Flags of this command"
    COMMAND = "Configuration and help"
    REFERENCE = "Reference model"
    PROMPTS = "Weights by prompts"
    COMPLETIONS = "Completions"
    REWARDS = "Rewards"
    VALUE_MODEL = "Value model"
    MODEL = "Model"
    ADAPTER = "Adapter and quantisation"
    DATA = "Data"
    BATCH = "Batch"
    OPTIMISATION = "Optimisation"
    EVALUATION = "Evaluation"
    CHECKPOINTS = "Checkpoints"
    LOGGING = "Logging"
    HUB = "Hugging Face Hub"
    DEVICES = "Devices and processes"


class _Help(str):
    """The help text of a field, with what else is known of it: all other metadata would be handed to argparse."""

    may_change: bool
    choices: tuple[str, ...]


def option(
    default: Any, help: str, *, choices: Iterable[str] = (), may_change: bool = False, secret: bool = False
) -> Any:
    """A dataclass field with the help text that the command line shows.

    Args:
        default: the default value; a list is copied for each instance.
        help: one line for `--help`.
        choices: all values that it takes, or each of a list of them; checked by `check_choices`.
        may_change: a run that is continued may have another value than before, and what it learns is the same.
        secret: it is never shown or written.
    """
    text = _Help(help.replace("%", "%%"))  # argparse formats it
    text.may_change, text.choices = may_change, tuple(choices)
    options: dict[str, Any] = {"metadata": {"help": text}, "repr": not secret}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), **options)
    return dataclasses.field(default=default, **options)


def without_secrets(config: Any) -> dict[str, Any]:
    """The fields of a config that are no secret."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.repr}


def lasting(config: Any) -> dict[str, Any]:
    """The fields of a config that a run cannot change on its way."""
    fields = [field for field in dataclasses.fields(config) if not field.metadata["help"].may_change]
    return {field.name: getattr(config, field.name) for field in fields}


def one_of(name: str, value: str, choices: list[str] | tuple[str, ...]) -> str:
    """Return `value` if it is among `choices`.

    Raises:
        ConfigError: names the field, the value, the nearest choice and all choices.
    """
    if value in choices:
        return value
    raise ConfigError(f"{name} is {value!r}{nearest(value, choices)}; it takes one of: {', '.join(choices)}")


def check_choices(config: Any) -> None:
    """Check every field that takes one of its choices, or a list of them; None is no choice.

    Raises:
        ConfigError: as `one_of`.
    """
    for field in dataclasses.fields(config):
        choices, value = field.metadata["help"].choices, getattr(config, field.name)
        if choices and value is not None:
            for each in value if isinstance(value, list | tuple) else [value]:
                one_of(field.name, each, choices)


def nearest(word: str, candidates: Any) -> str:
    """Return ` (did you mean 'x'?)` for the candidate closest to `word`, or an empty string."""
    bare, known = str(word).lstrip("-"), list(candidates)
    meant = str(word).removesuffix(bare) + MEANT.get(bare, bare)
    matches = [meant] if meant in known else difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def check_parts(config: Any) -> None:
    """Run the checks of every part that a flat config is composed of: the `__post_init__` of the composed class.

    A part has one base, `object` or another part; what composes parts has several.
    """
    for part in type(config).__mro__:
        if len(part.__bases__) == 1 and "__post_init__" in vars(part):
            part.__post_init__(config)


def part_of(config: Any, part: type) -> Any:
    """An instance of the dataclass `part`, filled from the fields of the same names in `config`."""
    return part(**{field.name: getattr(config, field.name) for field in dataclasses.fields(part)})
