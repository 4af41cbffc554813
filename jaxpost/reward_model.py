"""Reward models in the place of reward functions: each process scores its share of the texts on its own devices."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxpost.errors import ConfigError
from jaxpost.models.config import Compute
from jaxpost.models.pretrained import Loaded, named, open_source
from jaxpost.models.transformer import Decoder
from jaxpost.scoring import score

RewardFunction = str | Decoder | Callable[..., Any]


def reward_function(function: RewardFunction, args: Any, tokenizer: Any) -> str | Callable[..., Any]:
    """A reward model as a function, where the name is that of a folder; other names and functions as they are."""
    if isinstance(function, Decoder):
        return scorer(function, tokenizer, "reward_model", args)
    if isinstance(function, Loaded):
        return str(named(function, "reward_funcs"))
    if isinstance(function, str) and Path(function).is_dir():
        return reward_model(function, "reward_funcs", args)
    return function


def reward_model(path: str, flag: str, args: Any) -> Callable[..., Any]:
    """The model at a path as a function; texts are tokenised as it reads them.

    Raises:
        ConfigError: there is none, or it has no trained reward head.
    """
    source = open_source(path)
    if not source.has_trained_head("reward"):
        raise ConfigError(f"{flag}: {path} has no trained reward head; train one with jaxpost reward")
    model = source.load(head="reward", dtype=args.dtype, compute=Compute(dtype=args.dtype))
    return scorer(model, source.tokenizer(), Path(path).name, args)


def scorer(model: Decoder, tokenizer: Any, name: str, args: Any) -> Callable[..., Any]:
    """A reward function of a reward model and its tokenizer."""
    if model.head_kind != "reward":
        raise ConfigError(f'{name} has no score; load it with from_pretrained(path, head="reward")')

    def scores(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        rows = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, completions, strict=True)]
        return score(model, tokenizer, rows, batch_size=args.per_device_eval_batch_size).tolist()

    scores.__name__ = name
    return scores
