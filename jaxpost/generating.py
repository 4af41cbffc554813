"""Completions of prompts: `jaxpost generate`, from a file to a JSON Lines file in order, and `generate` in Python."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flax import nnx

from jaxpost.answers import answered, asked
from jaxpost.completer import Completer, CompletionsConfig, LoadConfig, check_least, completions, room
from jaxpost.data.fingerprint import digest
from jaxpost.data.prompts import read_prompts
from jaxpost.data.rows import as_rows
from jaxpost.data.sources import load_rows
from jaxpost.data.tokenizer import eos_ids
from jaxpost.errors import ConfigError
from jaxpost.models.transformer import Decoder
from jaxpost.options import check_parts, one_of, option
from jaxpost.sharding import mesh_of
from jaxpost.writing import Progress, check_output_file, write_lines


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(LoadConfig, CompletionsConfig):
    """Flags of `jaxpost generate`."""

    dataset_name: str | None = option(None, "Prompts: a .jsonl, .json or .parquet file, folder or hub id.")
    dataset_split: str = option("train", "Split of the dataset.")
    output_file: str | None = option(
        None, "JSON Lines file to write; the terminal by default. A run that was stopped goes on where it was."
    )
    batch_size: int = option(16, "Completions decoded together.")

    def __post_init__(self) -> None:
        check_parts(self)
        check_least(self, "batch_size")
        check_output_file(self.output_file)


def run_generate(config: GenerateConfig) -> None:
    """Complete every prompt of a dataset.

    Raises:
        ConfigError, DataError: a flag, the model or a row cannot be used; nothing is written.
    """
    for name in ("model_name_or_path", "dataset_name"):
        if vars(config)[name] is None:
            raise ConfigError(f"generate needs --{name}")
    rows = load_rows(str(config.dataset_name), config.dataset_split)
    completer = Completer(config, "generate")
    prompts, each = asked(rows, completer, config.max_new_tokens), config.num_return_sequences
    completer.load()

    def lines(start: int) -> Iterator[str]:
        """From prompt number `start` on."""
        options = {"each": each, "batch_size": config.batch_size, "start": start}
        for answers in answered(completer, prompts, config, **options):
            columns = answers.columns["prompt"], answers.texts, answers.completions
            for prompt, text, completion in zip(*columns, strict=True):
                ids = {"completion_ids": completion.tokens, "logprobs": completion.logps}
                yield json.dumps({"prompt": prompt, "completion": text, **ids}, ensure_ascii=False)

    if config.output_file is None:
        write_lines(None, lines(0))
        return
    chosen = {name: value for name, value in vars(config).items() if name not in ("output_file", "batch_size")}
    key = digest(chosen, prompts.digest(), completer.source.revision)
    with Progress(Path(config.output_file), key, each) as progress:
        for line in lines(len(progress) // each):
            progress.add(line)


def generate(
    model: Decoder,
    tokenizer: Any,
    prompts: Sequence[str | list[dict]],
    *,
    batch_size: int = 16,
    **options: Any,
) -> list[str]:
    """What a model says to each prompt; completions of one prompt follow each other.

    Args:
        model: of `from_pretrained(path)`, or a trainer's.
        tokenizer: of the model; its chat template makes texts of messages.
        prompts: texts that the model goes on with, or lists of messages that it answers.
        batch_size: completions decoded together.
        options: `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `stop_strings`,
            `num_return_sequences`, `seed`; the defaults are those of `jaxpost generate`, whose flags they are.

    Raises:
        ConfigError: an unknown option or one out of range, or a reward model.
        DataError: a prompt cannot be read, or is too long; it is named.
    """
    if model.head_kind != "lm":
        raise ConfigError("generate needs a language model; a reward model gives scores: score(model, tokenizer, rows)")
    if isinstance(prompts, str) or not all(isinstance(prompt, str | list) for prompt in prompts):
        raise ConfigError("prompts must be a list of texts, or of lists of messages")
    for name in options:
        one_of("an option of generate", name, [field.name for field in fields(CompletionsConfig)])
    config, limits = CompletionsConfig(**options), model.config
    limit = room(limits.max_positions, config.max_new_tokens)
    shared = {"vocab_size": limits.vocab_size, "max_tokens": limit, "remedy": "lower max_new_tokens"}
    rows = as_rows([{"prompt": prompt} for prompt in prompts], "the prompts")
    ends = eos_ids(tokenizer, {}, limits.hf, limits.vocab_size)
    found = completions(
        model,
        tokenizer,
        read_prompts(rows, tokenizer, **shared).tokens,
        config,
        ends,
        mesh_of(nnx.state(model)),
        batch_size=batch_size,
    )
    return [tokenizer.decode(completion.tokens, skip_special_tokens=True) for completion in found]
