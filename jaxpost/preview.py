"""`jaxpost preview`: what a run would train on, before a weight is read."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxpost.base_model import open_base
from jaxpost.data.mixture import type_of
from jaxpost.errors import ConfigError
from jaxpost.methods import Method, config_yaml, suited_to
from jaxpost.pipeline import Pipeline
from jaxpost.sharding import batch_groups, make_mesh

EXAMPLES = 3
SHOWN_TOKENS = 600  # of each example
MARKS = "«", "»"  # around what is trained, where there are no colours


def run_preview(method: Method, args: Any, console: Console | None = None) -> None:
    """Print the resolved config, what the rows are and what became of them, and the first examples of the first batch.

    Args:
        method: an entry of METHODS.
        args: its config, as for training.
        console: where to print; standard output by default.

    Raises:
        ConfigError, DataError: what training would raise before its first step, but for the weights.
    """
    if method.is_online:
        raise ConfigError(f"preview shows rows, but {method.name} samples what it trains on; see its completions/")
    console = console or Console(highlight=False, soft_wrap=True)
    mesh = make_mesh(args.mesh)
    base = open_base(None, args, None, mesh)
    args = suited_to(args, base.config)
    pipeline = Pipeline(method, args, base.tokenizer, base.vocab_size, batch_groups(mesh), base.notes)
    train_rows, eval_rows = pipeline.rows()
    train, held_out = pipeline.loaders(train_rows, eval_rows)
    console.print(config_yaml(args), markup=False)
    kind = type_of(train_rows, **method.rows(args))
    console.print(f"rows: {kind} (told by column {kind.column!r})")
    for note in base.notes:
        console.print(note, markup=False)
    total = f"{train.num_steps} steps" + (f", {held_out.num_steps} batches of evaluation" if held_out else "")
    first = train.batch(0)
    console.print(f"{total}; a batch is {list(first['tokens'].shape)} on this process")
    is_coloured = console.color_system is not None
    for number, (tokens, loss_mask) in zip(range(1, EXAMPLES + 1), examples_of(first), strict=False):
        trained = int(loss_mask.sum())
        console.rule(f"example {number}: {len(tokens)} tokens, {trained} trained", align="left")
        console.print(painted(base.tokenizer, tokens[:SHOWN_TOKENS], loss_mask[:SHOWN_TOKENS], is_coloured))
        if len(tokens) > SHOWN_TOKENS:
            console.print(f"... and {len(tokens) - SHOWN_TOKENS} more tokens", style="dim")


def examples_of(batch: dict[str, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens [T] and loss mask [T] of each example of a batch, row by row; those of branches with their prompts."""
    columns = (batch[name] for name in ("tokens", "loss_mask", "segments", "positions"))
    for tokens, loss_mask, segments, positions in zip(*columns, strict=True):
        trunk = tokens[:0]
        for segment in range(1, segments.max() + 1):
            own, mask, start = (
                tokens[segments == segment],
                loss_mask[segments == segment],
                positions[segments == segment][0],
            )
            trunk = trunk if start else own
            yield np.append(trunk[:start], own), np.append(np.zeros(start), mask)


def painted(tokenizer: Any, tokens: np.ndarray, loss_mask: np.ndarray, is_coloured: bool) -> Text:
    """The text of an example, with what is trained in green, or between MARKS."""
    text = Text()
    changes = np.flatnonzero(np.diff(loss_mask)) + 1
    for part, mask in zip(np.split(tokens, changes), np.split(loss_mask, changes), strict=True):
        words, is_trained = tokenizer.decode(part), bool(mask[:1].any())
        if is_trained and not is_coloured:
            words = words.join(MARKS)
        text.append(words, style="bold green" if is_trained else "dim")
    return text
