"""`jaxpost generate`: a file of prompts in, a JSON Lines file of completions out, in order."""

import json
from dataclasses import dataclass

from jaxpost.data.chat import encode_prompt
from jaxpost.data.sources import load_rows
from jaxpost.data.tokenizer import eos_ids
from jaxpost.errors import ConfigError, DataError
from jaxpost.models.config import Compute
from jaxpost.models.families import read_config
from jaxpost.models.pretrained import open_source
from jaxpost.options import option
from jaxpost.rl.generate import generate
from jaxpost.writing import write_lines


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Flags of `jaxpost generate`."""

    model_name_or_path: str | None = option(None, "Hub id, local Hugging Face folder or .gguf file.")
    dataset_name: str | None = option(None, "Prompts: a .jsonl, .json or .parquet file, folder or hub id.")
    dataset_split: str = option("train", "Split of the dataset.")
    output_file: str | None = option(None, "JSON Lines file to write; the terminal by default.")
    max_new_tokens: int = option(256, "Longest completion, in tokens.")
    temperature: float = option(1.0, "Softmax temperature; 0 is greedy.")
    seed: int = option(0, "Same seed, same completions.")
    batch_size: int = option(16, "Prompts decoded together.")
    dtype: str = option("float32", "Parameters and computation: float32, bfloat16 or float16.")
    allow_nonfinite_weights: bool = option(False, "Load a model even if its weights hold NaN or infinity.")


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
    ends = eos_ids(tokenizer, checkpoint.generation_config, checkpoint.config, vocab_size)
    cells = zip(*(rows[column] for column in ("prompt", "tools", "chat_template_kwargs")), strict=True)
    options = {"vocab_size": vocab_size, "name": str(config.dataset_name)}
    prompts = [
        encode_prompt(prompt, tokenizer, row=row, tools=tools, chat_template_kwargs=kwargs, **options)
        for row, (prompt, tools, kwargs) in enumerate(cells)
    ]
    model = source.load(
        dtype=config.dtype, compute=Compute(dtype=config.dtype), allow_nonfinite=config.allow_nonfinite_weights
    )
    completions = generate(
        model,
        prompts,
        max_new_tokens=config.max_new_tokens,
        eos_ids=ends,
        temperature=config.temperature,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    lines = (
        json.dumps(
            {
                "prompt": prompt,
                "completion": tokenizer.decode(completion.tokens, skip_special_tokens=True),
                "completion_ids": completion.tokens,
                "logprobs": completion.logps,
            },
            ensure_ascii=False,
        )
        for prompt, completion in zip(rows["prompt"], completions, strict=True)
    )
    write_lines(config.output_file, lines)
