"""Reward functions that can be named: each takes lists, one entry a completion, and gives a number each, or None.

A completion is text, or the messages of one turn. The columns of the dataset come by their names.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
THOUGHT = re.compile(r"<think>(?!.*<think>).*?</think>.*", re.DOTALL)


def text_of(completion: Any) -> str:
    """The text of a completion, which may be messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)


def last_number(text: str) -> float | None:
    """The last number that stands in a text, None if there is none; commas between digits do not count."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def exact_answer(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where the completion is the answer, but for space around it."""
    pairs = zip(completions, answer, strict=True)
    return [float(text_of(completion).strip() == str(expected).strip()) for completion, expected in pairs]


def numeric_answer(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1 where the last number of the completion is the last number of the answer; None where that has none."""
    found = []
    for completion, expected in zip(completions, answer, strict=True):
        right = last_number(str(expected))
        found.append(None if right is None else float(last_number(text_of(completion)) == right))
    return found


def accuracy_reward(completions: Sequence[Any], solution: Sequence[str], **_: Any) -> list[float | None]:
    """1 where math-verify finds the completion equal to the solution; None where it cannot read the solution.

    What it reads of a completion are LaTeX expressions, a boxed one first.
    """
    # The extra `math`.
    from latex2sympy2_extended import NormalizationConfig  # pyright: ignore[reportMissingImports]
    from math_verify import LatexExtractionConfig, parse, verify  # pyright: ignore[reportMissingImports]

    extraction = [
        LatexExtractionConfig(
            normalization_config=NormalizationConfig(units=True),
            boxed_match_priority=0,
            try_extract_without_anchor=False,
        )
    ]
    found = []
    for completion, expected in zip(completions, solution, strict=True):
        gold = parse(expected)
        given = (
            parse(text_of(completion), extraction_config=extraction, extraction_mode="first_match") if gold else None
        )
        found.append(float(verify(gold, given)) if gold else None)
    return found


def think_format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 where the completion begins with one thought, `<think>...</think>`."""
    return [float(THOUGHT.match(text_of(completion)) is not None) for completion in completions]


def soft_overlong_punishment(
    max_completion_len: int = 1280, soft_punish_cache: int = 256
) -> Callable[..., list[float]]:
    """From 0 down to -1 over the last `soft_punish_cache` tokens before `max_completion_len`.

    Yu et al., 2025, "DAPO", arXiv:2503.14476, equation 13.
    """
    begin = max_completion_len - soft_punish_cache

    def punish(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [
            0.0
            if len(ids) <= begin
            else -1.0
            if len(ids) > max_completion_len
            else (begin - len(ids)) / soft_punish_cache
            for ids in completion_ids
        ]

    return punish


def repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """`max_penalty` times the share of n-grams of tokens that were there before.

    Yeo et al., 2025, "Demystifying Long Chain-of-Thought Reasoning", arXiv:2502.03373, appendix C.2.
    """

    def punish(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        found = []
        for ids in completion_ids:
            ngrams = list(zip(*(ids[i:] for i in range(ngram_size)), strict=False))
            found.append(max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0)
        return found

    return punish


def length_reward(per_token: float = -0.001) -> Callable[..., list[float]]:
    """So much for each token of the completion."""

    def measure(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [per_token * len(ids) for ids in completion_ids]

    return measure


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (exact_answer, numeric_answer, accuracy_reward, think_format_reward)
}
# Those that are made with options of their own.
FACTORIES: dict[str, Callable[..., Callable[..., Any]]] = {
    factory.__name__: factory for factory in (soft_overlong_punishment, repetition_penalty_reward, length_reward)
}


def builtin(name: str, options: dict[str, Any]) -> Callable[..., Any]:
    """The reward function of that name.

    Raises:
        TypeError: it takes no such options.
    """
    if name in FACTORIES:
        return FACTORIES[name](**options)
    if options:
        raise TypeError(f"{name} takes no options")
    return FUNCTIONS[name]
