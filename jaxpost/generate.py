"""`jaxpost generate`: a file of prompts in, a JSON Lines file of completions out, in order."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxpost.completer import Completer, CompletionsConfig, LoadConfig, check_least
from jaxpost.data.chat import encode_prompt
from jaxpost.data.fingerprint import digest
from jaxpost.data.rows import Rows
from jaxpost.data.sources import load_rows
from jaxpost.errors import ConfigError, DataError
from jaxpost.options import check_parts, option
from jaxpost.writing import Progress, check_output_file, write_lines

ROUNDS = 4  # batches of completions between two writes


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
    if "prompt" not in rows.column_names:
        raise DataError(f"{config.dataset_name}: no column 'prompt'; columns: {', '.join(rows.column_names)}")
    completer = Completer(config, "generate")
    if config.max_new_tokens > completer.max_positions:
        raise ConfigError(completer.too_long(config.max_new_tokens))
    prompts = _prompts(rows, completer, str(config.dataset_name))
    each, asked = config.num_return_sequences, rows["prompt"]
    completer.load()

    def lines(start: int) -> Iterator[str]:
        """From prompt number `start` on."""
        size = max(1, ROUNDS * config.batch_size // each)
        for begin in range(start, len(prompts), size):
            part, first = prompts[begin : begin + size], begin * each
            completions = completer.complete(part, config, first_request=first, batch_size=config.batch_size)
            for number, completion in enumerate(completions, start=first):
                row = {
                    "prompt": asked[number // each],
                    "completion": completer.text(completion.tokens),
                    "completion_ids": completion.tokens,
                    "logprobs": completion.logps,
                }
                yield json.dumps(row, ensure_ascii=False)

    if config.output_file is None:
        write_lines(None, lines(0))
        return
    chosen = {name: value for name, value in vars(config).items() if name not in ("output_file", "batch_size")}
    key = digest(chosen, [ids.tolist() for ids in prompts], completer.source.revision)
    with Progress(Path(config.output_file), key, each) as progress:
        for line in lines(len(progress) // each):
            progress.add(line)


def _prompts(rows: Rows, completer: Completer, name: str) -> list[np.ndarray]:
    cells = zip(*(rows[column] for column in ("prompt", "tools", "chat_template_kwargs")), strict=True)
    options = {"vocab_size": completer.vocab_size, "name": name}
    return [
        encode_prompt(prompt, completer.tokenizer, row=row, tools=tools, chat_template_kwargs=kwargs, **options)
        for row, (prompt, tools, kwargs) in enumerate(cells)
    ]
