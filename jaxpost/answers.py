"""What a model says to the prompts of a dataset, to be evaluated."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxpost.completer import AnswerConfig, Completer, room
from jaxpost.data.prompts import Prompts, read_prompts
from jaxpost.data.rows import Rows
from jaxpost.metrics import normal_interval, wilson_interval
from jaxpost.rl.generate import Completion

ROUNDS = 4  # batches of completions that are sampled, and rewarded or written, at a time


class Answers(NamedTuple):
    """Completions, those of a prompt one after the other.

    Attributes:
        columns: cells of the dataset, one a completion, `prompt` among them.
        completions: of the model.
        texts: what they say.
    """

    columns: dict[str, list[Any]]
    completions: list[Completion]
    texts: list[str]

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row a completion."""
        names = list(self.columns)
        for cells, completion, text in zip(
            zip(*self.columns.values(), strict=True), self.completions, self.texts, strict=True
        ):
            said = {"completion": text, "num_tokens": len(completion.tokens), "ended": completion.ended}
            yield {**dict(zip(names, cells, strict=True)), **said}


def asked(rows: Rows, completer: Completer, max_new_tokens: int) -> Prompts:
    """The prompts of a dataset as a model reads them.

    Raises:
        ConfigError: the model has no room for a completion.
        DataError: a row cannot be used; it is named.
    """
    limit = room(completer.max_positions, max_new_tokens)
    options = {"vocab_size": completer.vocab_size, "max_tokens": limit, "remedy": "lower --max_new_tokens"}
    return read_prompts(rows, completer.tokenizer, **options)


def answered(
    completer: Completer, prompts: Prompts, config: AnswerConfig, *, each: int = 1, batch_size: int, start: int = 0
) -> Iterator[Answers]:
    """The completions of all prompts from number `start` on, some at a time."""
    size = max(1, ROUNDS * batch_size // each)
    for begin in range(start, len(prompts.tokens), size):
        part = slice(begin, begin + size)
        options = {"first_request": begin * each, "batch_size": batch_size}
        completions = completer.complete(prompts.tokens[part], config, **options)
        columns = {name: [cell for cell in cells[part] for _ in range(each)] for name, cells in prompts.columns.items()}
        yield Answers(columns, completions, [completer.text(completion.tokens) for completion in completions])


def lengths(completions: Sequence[Completion], max_new_tokens: int) -> str:
    """A line about how long completions are."""
    cut = sum(not completion.ended for completion in completions)
    mean = sum(len(completion.tokens) for completion in completions) / len(completions)
    return f"completions: {mean:.1f} tokens in the mean, {cut} of {len(completions)} cut after {max_new_tokens}"


def share(right: float, count: int, what: str) -> str:
    """A share with its confidence interval."""
    low, high = wilson_interval(right, count)
    return f"{right / count:.3f} (95 % interval {low:.3f} to {high:.3f}, {right:g} of {count} {what})"


def mean_of(values: Sequence[float], what: str) -> str:
    """A mean with its confidence interval, where there is one."""
    mean = f"{sum(values) / len(values):.4g}"
    if len(values) < 2:
        return f"{mean} (one of the {what} alone)"
    low, high = normal_interval(values)
    return f"{mean} (95 % interval {low:.4g} to {high:.4g}, {len(values)} {what})"
