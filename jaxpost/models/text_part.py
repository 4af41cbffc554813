"""The language model inside of a checkpoint that also sees images."""

import logging
from typing import Any

import numpy as np

from jaxpost.errors import ConfigError
from jaxpost.models.checkpoint import Checkpoint
from jaxpost.models.config_reader import IRRELEVANT

MULTIMODAL = ("gemma3",)
# How names begin: in transformers 4, in transformers 5, and of what is left out.
RENAMED = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
LEFT_OUT = tuple(f"{model}{part}." for model in ("", "model.") for part in ("vision_tower", "multi_modal_projector"))
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
KNOWN = {
    *("text_config", "vision_config", "tie_word_embeddings", "mm_tokens_per_image"),
    *("boi_token_index", "eoi_token_index", "image_token_index"),
}

_log = logging.getLogger("jaxpost")


class TextPart:
    """The text part of a multimodal checkpoint, as a checkpoint of its own; it is exported as such.

    Raises:
        ConfigError: there is no text part, or a field that may change it.
    """

    def __init__(self, whole: Checkpoint, source: str):
        text = whole.config.get("text_config")
        if not isinstance(text, dict):
            raise ConfigError(f"{source}: text_config in config.json must be an object")
        kind = whole.config.get("model_type")
        if kind not in MULTIMODAL:
            known = ", ".join(MULTIMODAL)
            raise ConfigError(f"{source}: model_type {kind!r:.80} is not supported; with a text part: {known}")
        unknown = sorted(set(whole.config) - KNOWN - IRRELEVANT)
        if unknown:
            raise ConfigError(f"{source}: config.json has {', '.join(unknown[:5])}, which jaxpost does not know")
        tokens = {name: value for name, value in whole.config.items() if name in TOKENS}
        tied = whole.config.get("tie_word_embeddings", True)  # transformers does not look at the text part's own field
        self.config: dict[str, Any] = {**tokens, **text, "tie_word_embeddings": tied}
        self.generation_config = whole.generation_config
        self.tokenizer = whole.tokenizer
        self._whole = whole
        kept = sorted(name for name in whole.names() if not name.startswith(LEFT_OUT))
        self._names = {_renamed(name): name for name in kept}
        if len(self._names) < len(kept):
            raise ConfigError(f"{source}: the same tensor of the text part is there under two names")
        _log.info("%s: %d tensors of its vision part are left out", source, len(whole.names()) - len(kept))

    def names(self) -> frozenset[str]:
        return frozenset(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._whole.shape(self._names[name])

    def read(self, name: str) -> np.ndarray:
        return self._whole.read(self._names[name])


def _renamed(name: str) -> str:
    return next((new + name[len(old) :] for old, new in RENAMED.items() if name.startswith(old)), name)
