"""Texts that end a completion."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxpost.errors import ConfigError


def stopper(tokenizer: Any, texts: Sequence[str]) -> Callable[[list[int]], int | None] | None:
    """Says after how many of its tokens a completion has one of the texts; None where there are none to look for.

    Raises:
        ConfigError: an empty text.
    """
    if not texts:
        return None
    if not all(texts):
        raise ConfigError("stop_strings has an empty text, with which every completion ends")

    def stop(tokens: list[int]) -> int | None:
        if not any(text in tokenizer.decode(tokens) for text in texts):
            return None
        low, high = 1, len(tokens)
        while low < high:
            middle = (low + high) // 2
            found = any(text in tokenizer.decode(tokens[:middle]) for text in texts)
            low, high = (low, middle) if found else (middle + 1, high)
        return low

    return stop
