"""The methods: what each is configured by, which objective it trains and how its rows are encoded."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxpost.data.bad_rows import BadRows
from jaxpost.data.chat import ACCEPTED, Counts, SFTDataConfig, encode_rows
from jaxpost.data.fingerprint import code_digest, digest, tokenizer_digest
from jaxpost.data.loader import LoaderConfig
from jaxpost.data.packing import PackingConfig, Packs, first_tokens, pack_examples, singles
from jaxpost.data.rows import Rows, take
from jaxpost.data.sources import DatasetConfig
from jaxpost.data.store import Store, StoreConfig, stored
from jaxpost.data.tokenizer import TokenizerConfig
from jaxpost.errors import ConfigError
from jaxpost.models.config import ModelConfig
from jaxpost.models.hf import ModelArguments
from jaxpost.models.lora_config import LoRAArguments
from jaxpost.models.quant import QuantConfig
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
    LoRAArguments,
    QuantConfig,
    DatasetConfig,
    TokenizerConfig,
    StoreConfig,
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
class SFTConfig(TrainConfig, SFTDataConfig, PackingConfig, SFT):
    """Supervised fine-tuning; names and defaults are TRL's."""

    learning_rate: float = option(2e-5, "Peak learning rate.")


class Encoded(NamedTuple):
    """A dataset as a run sees it.

    Attributes:
        packs: examples that stay together in a row.
        full: packs fill rows; they do not share one.
        notes: what became of the rows, for the user.
    """

    packs: Packs
    full: bool
    notes: list[str]


def encode_sft(
    rows: Rows,
    tokenizer: Any,
    config: "SFTConfig",
    *,
    vocab_size: int,
    training: bool,
    num_packs: int | None = None,
) -> Encoded:
    """Rows of text, messages or prompts with completions, packed if the config says so.

    `num_packs` are enough: rows beyond are not read.
    """
    length = packed_length(config, training)
    data = part_of(config, SFTDataConfig)
    if length and config.packing_strategy != "bfd" and config.on_long_row == "truncate":
        data = dataclasses.replace(data, max_length=None)  # these strategies go on with what is beyond
    name, budget = rows.name, None
    if num_packs is not None:
        rows, budget = (rows, num_packs * length) if length else (take(rows, num_packs), None)
    counts, bad_rows = Counts(), BadRows(config.on_bad_row)
    examples = encode_rows(rows, tokenizer, data, vocab_size=vocab_size, name=name, bad_rows=bad_rows, counts=counts)
    known = rows.identify(), tokenizer_digest(tokenizer)
    store = stored(
        examples if budget is None else first_tokens(examples, budget),
        lambda: {"rows": dataclasses.asdict(counts), "bad_rows": dict(bad_rows.counts)},
        folder=config.tokenized_cache_dir,
        key=None if None in known else digest(code_digest(), *known, data, vocab_size, config.on_bad_row, budget),
    )
    notes = row_notes(store, name)
    if not length:
        return Encoded(singles(store), False, notes)
    packs = pack_examples(store, length, config.packing_strategy)
    notes.append(f"{name}: packed into {len(packs)} rows of up to {length} tokens, {packs.efficiency(length):.1%} full")
    return Encoded(packs, True, notes)


def packed_length(config: "SFTConfig", training: bool) -> int | None:
    """Tokens of a packed row; None where rows are not packed.

    Raises:
        ConfigError: they are to be packed, but into no length.
    """
    if not config.packs(training):
        return None
    if config.max_length is None:
        raise ConfigError("packing fills rows of max_length tokens; give --max_length")
    return config.max_length


def row_notes(store: Store, name: str) -> list[str]:
    """What became of the rows of stored examples."""
    rows, bad_rows = Counts(**store.facts["rows"]), BadRows()
    bad_rows.counts.update(store.facts["bad_rows"])
    long = f", {rows.too_long} too long left out" if rows.too_long else ""
    kept = f"{rows.kept} rows, {rows.dropped} without a token to train dropped, {rows.truncated} truncated{long}"
    return [*([f"{name}: {bad_rows}"] if bad_rows.counts else []), f"{name}: {kept}"]


def sft_rows(config: SFTConfig) -> dict[str, Any]:
    """Which types of rows can be trained on."""
    return {"text_field": config.dataset_text_field, "accepted": ACCEPTED}


class Method(NamedTuple):
    """What the wiring needs to know of a method: its config, its objective, how it encodes rows and which it takes."""

    name: str
    config: type[Any]
    objective: Callable[[Any], Objective]
    encode: Callable[..., Encoded]
    rows: Callable[[Any], dict[str, Any]]


METHODS: dict[str, Method] = {
    "sft": Method("sft", SFTConfig, lambda config: part_of(config, SFT), encode_sft, sft_rows),
}


def with_router_coef(config: Any, model: ModelConfig) -> Any:
    """The config with `router_aux_loss_coef` as a number: by default the model's own, 0 where it has no experts.

    Raises:
        ConfigError: negative or not finite, or for a model without experts.
    """
    own, asked = model.experts.balance_coef if model.experts else 0.0, config.router_aux_loss_coef
    if asked is None:
        return dataclasses.replace(config, router_aux_loss_coef=own)
    if not 0 <= asked < math.inf:
        raise ConfigError(f"router_aux_loss_coef is {asked}; it must not be negative, and 0 is none")
    if asked and model.experts is None:
        kind = model.hf.get("model_type", "dense")
        raise ConfigError(f"router_aux_loss_coef is {asked}, but a {kind} model has no experts; leave it out")
    return config


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
