"""The methods: what each is configured by, which objective it trains and how its rows are encoded."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxpost.data.chat import Example, SFTDataConfig, encode_rows
from jaxpost.data.formats import DatasetConfig
from jaxpost.data.loader import LoaderConfig
from jaxpost.models.hf import ModelArguments
from jaxpost.objectives.base import Objective
from jaxpost.objectives.sft import SFT
from jaxpost.options import check_parts, option, part_of
from jaxpost.sharding import MeshConfig
from jaxpost.train.checkpoint import CheckpointConfig
from jaxpost.train.evaluate import EvalConfig
from jaxpost.train.logging import LoggingConfig
from jaxpost.train.loop import LoopConfig
from jaxpost.train.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    ModelArguments,
    DatasetConfig,
    LoaderConfig,
    OptimConfig,
    LoopConfig,
    EvalConfig,
    CheckpointConfig,
    LoggingConfig,
    MeshConfig,
):
    """The fields that every method shares; each is declared beside the code that reads it."""

    compilation_cache_dir: str = option("~/.cache/jaxpost/xla", "Folder for compiled programs; empty for none.")

    def __post_init__(self) -> None:
        check_parts(self)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig, SFTDataConfig, SFT):
    """Supervised fine-tuning; names and defaults are TRL's."""

    learning_rate: float = option(2e-5, "Peak learning rate.")


class Method(NamedTuple):
    """What the wiring needs to know of a method."""

    name: str
    config: type[Any]
    objective: Callable[[Any], Objective]
    encode: Callable[..., tuple[list[Example], Any]]


METHODS: dict[str, Method] = {
    "sft": Method("sft", SFTConfig, lambda config: part_of(config, SFT), encode_rows),
}


def changed_fields(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    default = type(config)()
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != getattr(default, field.name)
    }


def config_yaml(config: Any) -> str:
    """The resolved config as YAML that `--config` reads back."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=True, allow_unicode=True)
