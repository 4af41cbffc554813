"""Weights of undesirable examples, by how much more frequent their prompts are among the desirable ones."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxpost.data.loader import Loader, shuffled
from jaxpost.data.store import Store
from jaxpost.errors import ConfigError
from jaxpost.objectives.density_ratio import density_ratio, fit_classifier
from jaxpost.options import Group, option

COLUMN = "weight"  # of batches


@dataclass(frozen=True, kw_only=True)
class PromptWeightsConfig:
    """How undesirable examples are weighted; TRL's names and defaults, but for the model."""

    help_group = Group.PROMPTS

    embedding_model: str | None = option(
        None,
        "Weigh undesirable examples by how much their prompts are like those of desirable ones, told by the mean of "
        "this model's last hidden states: an HF folder or hub name, also that of model_name_or_path; null for no "
        "weights.",
        may_change=True,
    )
    prompt_sample_size: int = option(1024, "Prompts of either kind that such weights are learned from, at most.")
    min_density_ratio: float = option(0.5, "Least weight of an undesirable example.")
    max_density_ratio: float = option(10.0, "Largest weight of an undesirable example.")

    def __post_init__(self) -> None:
        low, high = self.min_density_ratio, self.max_density_ratio
        if self.prompt_sample_size < 1:
            raise ConfigError(f"prompt_sample_size is {self.prompt_sample_size}; it must be at least 1")
        if not 0 <= low < math.inf:
            raise ConfigError(f"min_density_ratio is {low}; it must be a number from 0 on")
        if not (0 < high < math.inf and low <= high):
            raise ConfigError(f"max_density_ratio is {high}; it must be above 0 and not below min_density_ratio {low}")


class Embedder(NamedTuple):
    """What makes points of prompts.

    Attributes:
        embed: texts -> [N, E], which becomes an array.
        at_once: most texts that it is given together.
        digest: what tells it from others; None where that is not known.
    """

    embed: Callable[[list[str]], Any]
    at_once: int
    digest: str | None = None


class PromptWeights:
    """The weights of examples; the classifier that they come from is fitted when this is made.

    Args:
        config: of the run, a PromptWeightsConfig with the seed that prompts are sampled by.
        tokenizer: of the run.
        embedder: of the prompts.
        examples: that are trained on, some of either label, which is their value.

    Raises:
        ConfigError: the embeddings cannot be used.
    """

    def __init__(self, config: Any, tokenizer: Any, embedder: Embedder, examples: Store) -> None:
        self._config, self._tokenizer = config, tokenizer
        numbers = np.concatenate([_sampled(examples, label, config) for label in (1, 0)])
        labels, prompts = examples.values[numbers] > 0, self._prompts(examples, numbers)
        points = np.concatenate([*embedded(prompts, embedder)])
        self._classifier = fit_classifier(points, labels)
        log_odds = self._classifier.log_odds(points)
        self._known = dict(zip(prompts, log_odds.tolist(), strict=True))
        right = [float(np.mean(log_odds[labels] > 0)), float(np.mean(log_odds[~labels] <= 0))]
        self._told = f"{len(numbers)} prompts that recognises {right[0]:.0%} of the desirable, {right[1]:.0%} of others"

    def tell(self, loader: Loader, embedder: Embedder) -> None:
        """Let batches tell the weight of every example: 1 for desirable ones.

        Raises:
            ConfigError: the embeddings cannot be used.
        """
        examples, config = loader.packs.examples, self._config
        weights, others = np.ones(len(examples), np.float32), np.flatnonzero(examples.values == 0)
        for start in range(0, len(others), embedder.at_once):
            numbers = others[start : start + embedder.at_once]
            prompts = self._prompts(examples, numbers)
            found = {prompt: self._known.get(prompt) for prompt in prompts}
            new = [prompt for prompt, log_odds in found.items() if log_odds is None]
            for points in embedded(new, embedder, len(self._classifier.slope)):
                found |= zip(new, self._classifier.log_odds(points).tolist(), strict=True)
            log_odds = np.array([found[prompt] for prompt in prompts])
            weights[numbers] = density_ratio(log_odds, config.min_density_ratio, config.max_density_ratio)
        loader.tell(COLUMN, weights)

    def note(self, loader: Loader) -> str:
        """The weights that batches tell, in a line."""
        weights = _of_undesirable(loader)
        spread = f"from {weights.min():.3g} to {weights.max():.3g}, {weights.mean():.3g} on average"
        return f"weights of {len(weights)} undesirable examples: {spread}; told by a classifier of {self._told}"

    def _prompts(self, examples: Store, numbers: np.ndarray) -> list[str]:
        """Texts of the prompts, with what the chat template has put there."""
        tokens = (examples[i].tokens[: examples.starts[i]] for i in numbers)
        return [self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in tokens]


def identity(loader: Loader, embedder: Embedder) -> dict[str, str]:
    """What tells the weights that batches tell from others, and does not differ by what rounding changes."""
    if embedder.digest is not None:
        return {"prompt embeddings": embedder.digest}
    return {"mean weight of undesirable examples": f"{_of_undesirable(loader).mean():.3g}"}


def unweighted(config: Any) -> list[str]:
    """What is to be said of an evaluation of a config that has weights, where nothing is trained on."""
    weighs = isinstance(config, PromptWeightsConfig) and config.embedding_model is not None
    return ["embedding_model: weights are learned from the prompts of a run; this loss has none"] if weighs else []


def embedded(prompts: Sequence[str], embedder: Embedder, size: int | None = None) -> Iterator[np.ndarray]:
    """The points of prompts, as many at a time as the embedder takes, float64 [N, E].

    Args:
        prompts: each is shown once, however often it is among those of a time.
        embedder: that they are shown to.
        size: E; by default that of the first.

    Raises:
        ConfigError: what it makes is no such array, or not finite.
    """
    for start in range(0, len(prompts), embedder.at_once):
        part = prompts[start : start + embedder.at_once]
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(part))}
        made = embedder.embed([*places])
        try:
            points = np.asarray(made, np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the embeddings of prompts are no array: {error}") from error
        if points.ndim != 2 or len(points) != len(places) or size not in (None, points.shape[1]):
            wanted = f"[{len(places)}, {size or 'E'}]"
            raise ConfigError(f"the embeddings of {len(places)} prompts are {[*points.shape]}; they must be {wanted}")
        if not np.isfinite(points).all():
            first = [*places][int(np.argmin(np.isfinite(points).all(axis=1)))]
            raise ConfigError(f"the embedding of the prompt {first[:80]!r} is not finite")
        size = points.shape[1]
        yield points[[places[prompt] for prompt in part]]


def _sampled(examples: Store, label: int, config: Any) -> np.ndarray:
    """Numbers of examples of a label, each at most once."""
    numbers = np.flatnonzero(examples.values == label)
    return numbers[shuffled(len(numbers), config.seed, label)[: config.prompt_sample_size]]


def _of_undesirable(loader: Loader) -> np.ndarray:
    assert loader.packs.facts is not None
    return loader.packs.facts[COLUMN][loader.packs.examples.values == 0]
