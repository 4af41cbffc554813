"""A model that completes prompts, for whatever asks it: a file of prompts, an evaluation, a chat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpost.compilation import CompilationConfig, keep_programs
from jaxpost.data.tokenizer import eos_ids
from jaxpost.errors import ConfigError
from jaxpost.models.config import Compute
from jaxpost.models.families import read_config
from jaxpost.models.hf import PARAMETER_DTYPES
from jaxpost.models.pretrained import open_source
from jaxpost.models.transformer import Decoder
from jaxpost.options import Group, check_choices, option, part_of
from jaxpost.rl.generate import Completion, generate
from jaxpost.rl.sampling import SamplingConfig
from jaxpost.rl.stopping import stopper
from jaxpost.sharding import make_mesh


@dataclass(frozen=True, kw_only=True)
class LoadConfig(CompilationConfig):
    """Which model, and how it is loaded."""

    help_group = Group.MODEL

    model_name_or_path: str | None = option(None, "Hub id, local Hugging Face folder, adapter or .gguf file.")
    model_revision: str = option("main", "Branch, tag or commit of a hub model.")
    dtype: str = option(
        "float32", "Parameters and computation: float32, bfloat16 or float16.", choices=PARAMETER_DTYPES
    )
    mesh: str | None = option(None, "Mesh axes, e.g. fsdp=8; by default all devices are on fsdp.")
    allow_nonfinite_weights: bool = option(False, "Load a model even if its weights hold NaN or infinity.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)


@dataclass(frozen=True, kw_only=True)
class AnswerConfig(SamplingConfig):
    """How a prompt is completed."""

    help_group = Group.COMPLETIONS

    max_new_tokens: int = option(256, "Longest completion, in tokens.")
    seed: int = option(0, "Same seed, same completions.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class CompletionsConfig(AnswerConfig):
    """How many prompts are completed."""

    help_group = Group.COMPLETIONS

    num_return_sequences: int = option(1, "Completions of each prompt, one after the other in the file.")
    stop_strings: list[str] | None = option(None, "Texts that end a completion, itself included.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "num_return_sequences")


def check_least(config: Any, *names: str) -> None:
    """Raise ConfigError for a number below 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


class Completer:
    """A model as it was found; its weights are read when it is first asked, or by `load`.

    Args:
        config: which model.
        command: for messages.
        name: of another model than the config's.

    Attributes:
        source: of the model.
        tokenizer: of the model.
        vocab_size: its embedding rows.
        max_positions: tokens that it reads, prompt and completion together.
        ends: ids that end a completion.
        mesh: where it lies.

    Raises:
        ConfigError: there is no such model, or its files cannot be used.
    """

    def __init__(self, config: LoadConfig, command: str, *, name: str | None = None):
        named, revision = (config.model_name_or_path, config.model_revision) if name is None else (name, None)
        if named is None:
            raise ConfigError(f"{command} needs --model_name_or_path")
        keep_programs(config)
        self._config = config
        self._model: Decoder | None = None
        self.source = open_source(named, revision)
        checkpoint = self.source.checkpoint
        self.tokenizer: Any = self.source.tokenizer()
        model_config = read_config(checkpoint.config, named)
        self.vocab_size, self.max_positions = model_config.vocab_size, model_config.max_positions
        self.ends = eos_ids(self.tokenizer, checkpoint.generation_config, checkpoint.config, self.vocab_size)
        self.mesh = make_mesh(config.mesh)

    def load(self) -> Decoder:
        """The model with its weights, which are read once.

        Raises:
            ConfigError: they cannot be.
        """
        if self._model is None:
            config = self._config
            options = {"dtype": config.dtype, "compute": Compute(dtype=config.dtype), "mesh": self.mesh}
            self._model = self.source.load(allow_nonfinite=config.allow_nonfinite_weights, **options)
        return self._model

    def unload(self) -> None:
        """Let go of the weights."""
        self._model = None

    def complete(self, prompts: Sequence[np.ndarray], config: AnswerConfig, **options: Any) -> list[Completion]:
        """Completions of each prompt, one after the other; `options` are those of `generate`.

        Raises:
            ConfigError: the weights cannot be read.
        """
        return completions(self.load(), self.tokenizer, prompts, config, self.ends, self.mesh, **options)

    def text(self, tokens: Sequence[int]) -> str:
        """What a completion says."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def room(max_positions: int, max_new_tokens: int) -> int:
    """Tokens of a prompt that leave room for such a completion.

    Raises:
        ConfigError: there are none.
    """
    if max_new_tokens >= max_positions:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens}, but the model reads {max_positions} tokens, prompt and completion "
            "together; lower it"
        )
    return max_positions - max_new_tokens


def completions(
    model: Decoder,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    config: AnswerConfig,
    ends: Sequence[int],
    mesh: Mesh,
    **options: Any,
) -> list[Completion]:
    """Completions of each prompt, one after the other; `options` are those of `generate`."""
    shared = {"max_new_tokens": config.max_new_tokens, "seed": config.seed, "eos_ids": ends}
    if isinstance(config, CompletionsConfig):
        stop = stopper(tokenizer, config.stop_strings or [])
        shared |= {"num_return_sequences": config.num_return_sequences, "stop": stop}
    sampling = part_of(config, SamplingConfig).knobs()
    with jax.set_mesh(mesh):
        return generate(model, prompts, sampling=sampling, **shared | options)


def as_asked(text: str, prompt: Any) -> Any:
    """A completion as reward functions see it: text, or messages where the prompt is messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
