"""Reward models in the place of reward functions: each process scores its share of the texts on its own devices."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxpost.errors import ConfigError
from jaxpost.models.config import Compute
from jaxpost.models.pretrained import Loaded, Source, named, open_source
from jaxpost.models.transformer import Decoder
from jaxpost.scoring import score

RewardFunction = str | Decoder | Callable[..., Any]


def reward_function(function: RewardFunction, tokenizer: Any, **options: Any) -> str | Callable[..., Any]:
    """A reward model as a function, where the name is that of a folder; other names and functions as they are.

    `tokenizer` is that of a model which is given itself; `options` are the dtype and the batch_size.
    """
    if isinstance(function, Decoder):
        return scorer(function, tokenizer, "reward_model", options["batch_size"])
    if isinstance(function, Loaded):
        return str(named(function, "reward_funcs"))
    if isinstance(function, str) and Path(function).is_dir():
        return reward_model(function, "reward_funcs", **options)
    if not isinstance(function, str) and not callable(function):
        raise ConfigError(f"reward_funcs: {function!r} is no function; give functions, or their names")
    return function


def reward_model(path: str, flag: str, *, dtype: str, batch_size: int) -> Callable[..., Any]:
    """The model at a path as a function; texts are tokenised as it reads them.

    Raises:
        ConfigError: there is none, or it has no trained reward head.
    """
    source = open_reward_model(path, flag)
    model = source.load(head="reward", dtype=dtype, compute=Compute(dtype=dtype))
    return scorer(model, source.tokenizer(), Path(path).name, batch_size)


def open_reward_model(path: str, flag: str) -> Source:
    """The model at a path, its weights not read yet.

    Raises:
        ConfigError: there is none, or it has no trained reward head.
    """
    source = open_source(path)
    if not source.has_trained_head("reward"):
        raise ConfigError(f"{flag}: {path} has no trained reward head; train one with jaxpost reward")
    return source


def scorer(model: Decoder, tokenizer: Any, name: str, batch_size: int) -> Callable[..., Any]:
    """A reward function of a reward model and its tokenizer."""
    if model.head_kind != "reward":
        raise ConfigError(f'{name} has no score; load it with from_pretrained(path, head="reward")')

    def scores(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        rows = [_whole(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        return score(model, tokenizer, rows, batch_size=batch_size).tolist()

    scores.__name__ = name
    return scores


def _whole(prompt: Any, completion: Any) -> dict[str, Any]:
    """One text of both: unlike that of a dataset, a completion of a policy may be empty."""
    return {"text": prompt + completion} if isinstance(prompt, str) else {"messages": [*prompt, *completion]}
