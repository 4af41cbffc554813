"""Rollouts of the user's own: a function that talks to the policy as often as it likes, with tools or other players.

    def rollout(prompts, trainer):
        ids = [trainer.encode(prompt) for prompt in prompts]
        answers = trainer.generate(ids, num_return_sequences=trainer.num_generations)
        ...
        return {"prompt_ids": ..., "completion_ids": ..., "logprobs": ..., "env_mask": ..., "anything": ...}

It is TRL's `rollout_func`: it is given each prompt once and returns lists, an entry a completion, those of a prompt one
after the other. `env_mask` is 1 where the policy drew the token and 0 where it was told it, which is read and not
learned from. Any other list becomes an argument of the reward functions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpost.errors import ConfigError, RolloutError
from jaxpost.rl.generate import Completion
from jaxpost.rl.reward_worker import Source, describe, find, name_of

RolloutFunction = Callable[[list[Any], "Policy"], Mapping[str, Any]]
NEEDED = ("prompt_ids", "completion_ids", "logprobs")


class Policy:
    """The policy as a rollout function sees it.

    Args:
        encode: tokens of a prompt.
        sample: (prompts, seed, further arguments of `rl.generate.generate`) -> completions.
        args: config of the run.
        processing_class: the tokenizer.
        num_generations: completions of each prompt that are asked for.
        key: what random numbers depend on.

    Attributes:
        args, processing_class, num_generations: that were given.
    """

    def __init__(
        self,
        encode: Callable[[Any], np.ndarray],
        sample: Callable[..., list[Completion]],
        args: Any,
        processing_class: Any,
        num_generations: int,
        key: Sequence[int],
    ):
        self._encode, self._sample, self._key, self._calls = encode, sample, list(key), 0
        self.args, self.processing_class, self.num_generations = args, processing_class, num_generations

    def encode(self, prompt: Any) -> list[int]:
        """Tokens of a prompt, text or messages, up to where the policy goes on."""
        return self._encode(prompt).tolist()

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        num_return_sequences: int = 1,
        max_new_tokens: int | None = None,
        stop_strings: Sequence[str] = (),
    ) -> list[Completion]:
        """Completions, those of a prompt one after the other; the same again where a run is resumed.

        Args:
            prompt_ids: tokens of each prompt.
            num_return_sequences: completions of each.
            max_new_tokens: of each; `max_completion_length` by default.
            stop_strings: texts that end a completion, beside its end tokens.

        Raises:
            ConfigError: an argument is out of range.
        """
        seed = int(np.random.default_rng([*self._key, self._calls]).integers(2**31))
        self._calls += 1
        return self._sample(
            [np.asarray(ids, np.int32) for ids in prompt_ids],
            seed,
            num_return_sequences=num_return_sequences,
            max_new_tokens=max_new_tokens or self.args.max_completion_length,
            stop_strings=list(stop_strings),
        )


class Limits(NamedTuple):
    """What tokens may be.

    Attributes:
        vocab_size: ids are below.
        max_positions: tokens of a prompt and its completion.
        eos_ids: that end a completion.
    """

    vocab_size: int
    max_positions: int
    eos_ids: Sequence[int]


def called(
    function: RolloutFunction, prompts: list[Any], policy: Policy, limits: Limits
) -> tuple[list[np.ndarray], list[Completion], dict[str, list[Any]]]:
    """Prompts and completions that a function returns, and the lists beside.

    Raises:
        RolloutError: it raises, or returns something else than it should; the completion is named.
    """
    name, count = name_of(function), len(prompts) * policy.num_generations
    try:
        returned = function(prompts, policy)
    except Exception as error:
        raise RolloutError(f"rollout_func {name}: {describe(error)}") from error
    if not isinstance(returned, Mapping):
        raise RolloutError(f"rollout_func {name} returned {type(returned).__name__}, not a dict of lists")
    missing = [key for key in NEEDED if key not in returned]
    if missing:
        raise RolloutError(f"rollout_func {name} returned no {', '.join(missing)}; it needs {', '.join(NEEDED)}")
    columns = {key: value for key, value in returned.items() if value is not None}
    for key, value in columns.items():
        if not hasattr(value, "__len__") or len(value) != count:
            size = len(value) if hasattr(value, "__len__") else "no list"
            raise RolloutError(
                f"rollout_func {name}: {key} has {size} entries, but {len(prompts)} prompts x num_generations "
                f"{policy.num_generations} are {count} completions"
            )
    found = [columns.pop(key) for key in NEEDED]
    masks = columns.pop("env_mask", [None] * count)
    read = []
    for number, (prompt, ids, logps, mask) in enumerate(zip(*found, masks, strict=True)):
        try:
            read.append(_completion(prompt, ids, logps, mask, limits))
        except (TypeError, ValueError) as error:
            raise RolloutError(f"rollout_func {name}, completion {number + 1}: {error}") from error
    return [prompt for prompt, _ in read], [completion for _, completion in read], dict(columns)


def _completion(prompt: Any, ids: Any, logps: Any, mask: Any, limits: Limits) -> tuple[np.ndarray, Completion]:
    """A prompt and its completion.

    Raises:
        ValueError: something is wrong with them.
    """
    tokens = {"prompt_ids": _ids(prompt), "completion_ids": _ids(ids)}
    for key, values in tokens.items():
        if not values:
            raise ValueError(f"{key} is empty")
        if not all(0 <= value < limits.vocab_size for value in values):
            raise ValueError(f"{key} has an id that is not from 0 to {limits.vocab_size - 1}")
    before, after = tokens.values()
    if len(before) + len(after) > limits.max_positions:
        raise ValueError(f"{len(before)} + {len(after)} tokens; the model reads {limits.max_positions}")
    own = [True] * len(after) if mask is None else [bool(flag) for flag in mask]
    said = [float(value) for value in logps]
    for key, values in (("logprobs", said), ("env_mask", own)):
        if len(values) != len(after):
            raise ValueError(f"{key} has {len(values)} entries for {len(after)} completion_ids")
    said = [value if flag else 0.0 for value, flag in zip(said, own, strict=True)]
    if not any(own):
        raise ValueError("env_mask is 0 everywhere; the policy has drawn nothing")
    if not all(math.isfinite(value) for value in said):
        raise ValueError("logprobs are not all finite")
    prompt_ids = np.asarray(before, np.int32)
    return prompt_ids, Completion(after, said, after[-1] in limits.eos_ids, None if mask is None else own)


def _ids(values: Any) -> list[int]:
    try:
        return [int(value) for value in values]
    except TypeError as error:
        raise ValueError(f"{values!r} is no list of token ids") from error


def rollout_function(named: RolloutFunction | str | None) -> RolloutFunction | None:
    """The function itself, of `file.py:function` too; it runs in this process, where the policy is.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(named, str):
        return named
    path, colon, name = named.rpartition(":")
    if not colon or not path.endswith(".py") or not Path(path).is_file():
        raise ConfigError(f"rollout_func is {named!r}; give file.py:function, of a file that exists")
    try:
        return find(Source("file", str(Path(path).resolve()), name, {}, []))
    except Exception as error:
        raise ConfigError(f"rollout_func {named}: {describe(error)}") from error
