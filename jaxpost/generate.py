"""`jaxpost generate`: a file of prompts in, a JSON Lines file of completions out, in order."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpost.data.chat import encode_prompt
from jaxpost.data.fingerprint import digest
from jaxpost.data.rows import Rows
from jaxpost.data.sources import load_rows
from jaxpost.data.tokenizer import eos_ids
from jaxpost.errors import ConfigError, DataError
from jaxpost.models.config import Compute
from jaxpost.models.families import read_config
from jaxpost.models.hf import PARAMETER_DTYPES
from jaxpost.models.pretrained import open_source
from jaxpost.options import check_choices, option, part_of
from jaxpost.rl.generate import generate
from jaxpost.rl.sampling import SamplingConfig
from jaxpost.rl.stopping import stopper
from jaxpost.sharding import make_mesh
from jaxpost.writing import Progress, write_lines

ROUNDS = 4  # batches of completions between two writes


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Flags of `jaxpost generate`."""

    model_name_or_path: str | None = option(None, "Hub id, local Hugging Face folder or .gguf file.")
    dataset_name: str | None = option(None, "Prompts: a .jsonl, .json or .parquet file, folder or hub id.")
    dataset_split: str = option("train", "Split of the dataset.")
    output_file: str | None = option(
        None, "JSON Lines file to write; the terminal by default. A run that was stopped goes on where it was."
    )
    max_new_tokens: int = option(256, "Longest completion, in tokens.")
    num_return_sequences: int = option(1, "Completions of each prompt, one after the other in the file.")
    stop_strings: list[str] | None = option(None, "Texts that end a completion, itself included.")
    seed: int = option(0, "Same seed, same completions.")
    batch_size: int = option(16, "Completions decoded together.")
    dtype: str = option(
        "float32", "Parameters and computation: float32, bfloat16 or float16.", choices=PARAMETER_DTYPES
    )
    mesh: str | None = option(None, "Mesh axes, e.g. fsdp=8; by default all devices are on fsdp.")
    allow_nonfinite_weights: bool = option(False, "Load a model even if its weights hold NaN or infinity.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        for name in ("max_new_tokens", "num_return_sequences", "batch_size"):
            if vars(self)[name] < 1:
                raise ConfigError(f"{name} is {vars(self)[name]}; it must be at least 1")


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
    source = open_source(str(config.model_name_or_path))
    checkpoint, tokenizer = source.checkpoint, source.tokenizer()
    vocab_size = read_config(checkpoint.config, str(config.model_name_or_path)).vocab_size
    prompts = _prompts(rows, tokenizer, vocab_size, str(config.dataset_name))
    mesh = make_mesh(config.mesh)
    options = {"dtype": config.dtype, "compute": Compute(dtype=config.dtype), "mesh": mesh}
    model = source.load(allow_nonfinite=config.allow_nonfinite_weights, **options)
    ends = eos_ids(tokenizer, checkpoint.generation_config, checkpoint.config, vocab_size)
    each, asked = config.num_return_sequences, rows["prompt"]

    def lines(start: int) -> Iterator[str]:
        """From prompt number `start` on."""
        size = max(1, ROUNDS * config.batch_size // each)
        for begin in range(start, len(prompts), size):
            completions = generate(
                model,
                prompts[begin : begin + size],
                max_new_tokens=config.max_new_tokens,
                eos_ids=ends,
                sampling=part_of(config, SamplingConfig).knobs(),
                num_return_sequences=each,
                seed=config.seed,
                first_request=begin * each,
                batch_size=config.batch_size,
                stop=stopper(tokenizer, config.stop_strings or []),
            )
            for number, completion in enumerate(completions, start=begin * each):
                row = {
                    "prompt": asked[number // each],
                    "completion": tokenizer.decode(completion.tokens, skip_special_tokens=True),
                    "completion_ids": completion.tokens,
                    "logprobs": completion.logps,
                }
                yield json.dumps(row, ensure_ascii=False)

    with jax.set_mesh(mesh):
        if config.output_file is None:
            write_lines(None, lines(0))
            return
        chosen = {name: value for name, value in vars(config).items() if name not in ("output_file", "batch_size")}
        key = digest(chosen, [ids.tolist() for ids in prompts], source.revision)
        with Progress(Path(config.output_file), key, each) as progress:
            for line in lines(len(progress) // each):
                progress.add(line)


def _prompts(rows: Rows, tokenizer: Any, vocab_size: int, name: str) -> list[np.ndarray]:
    cells = zip(*(rows[column] for column in ("prompt", "tools", "chat_template_kwargs")), strict=True)
    options = {"vocab_size": vocab_size, "name": name}
    return [
        encode_prompt(prompt, tokenizer, row=row, tools=tools, chat_template_kwargs=kwargs, **options)
        for row, (prompt, tools, kwargs) in enumerate(cells)
    ]
