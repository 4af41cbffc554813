"""`jaxpost preview`: what a run would train on, before a weight is read."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.text import Text

from jaxpost.base_model import BaseModel, open_base
from jaxpost.config_file import annotated
from jaxpost.data.mixture import type_of
from jaxpost.data.prompts import Prompts
from jaxpost.methods import Method, suited_to
from jaxpost.online import prompts_of, steps_per_epoch
from jaxpost.pipeline import Pipeline, rows_of
from jaxpost.rl.plan import Plan, plan
from jaxpost.sharding import batch_groups, make_mesh

EXAMPLES = 3
SHOWN_TOKENS = 600  # of each example
MARKS = "«", "»"  # around what is trained, where there are no colours


class Preview(NamedTuple):
    """What a run would train on.

    Attributes:
        args: its config, suited to the model.
        base: the model as it was opened.
        num_steps: optimizer steps.
        num_eval_batches: of an evaluation; 0 for none.
        kind: of the rows.
        data: their first batch, or prompts and how many of them make up a generation.
        longest: a batch of the longest rows, with nothing in it; None where completions are sampled.
    """

    args: Any
    base: BaseModel
    num_steps: int
    num_eval_batches: int
    kind: str
    data: Mapping[str, np.ndarray] | tuple[Prompts, Plan]
    longest: dict[str, np.ndarray] | None


def run_preview(method: Method, args: Any, console: Console | None = None) -> None:
    """Print the resolved config, what the rows are and what became of them, and the first examples of the first batch.

    Args:
        method: an entry of METHODS.
        args: its config, as for training.
        console: where to print; standard output by default.

    Raises:
        ConfigError, DataError: what training would raise before its first step, but for the weights and rewards.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    preview = preview_of(method, args, make_mesh(args.mesh))
    console.print(annotated(preview.args, method.name), markup=False)
    show_data(preview, console)


def preview_of(method: Method, args: Any, mesh: Mesh) -> Preview:
    """Open the model and read the rows of a run; raises as `run_preview`."""
    lora = args.lora_config() if args.use_peft else None
    base = open_base(None, args, None, mesh, lora, method.head)
    args = suited_to(args, base.config)
    if method.is_online:
        numbers = plan(args, args.per_device_train_batch_size, batch_groups(mesh), args.gradient_accumulation_steps)
        train_rows, eval_rows = rows_of(method, args)
        prompts = prompts_of(train_rows, args, base)
        held_out = 0 if eval_rows is None else len(prompts_of(eval_rows, args, base).tokens)
        steps = args.total_steps(steps_per_epoch(numbers, prompts))
        kind = type_of(train_rows, **method.rows(args))
        return Preview(args, base, steps, held_out, f"{kind}", (prompts, numbers), None)
    pipeline = Pipeline(method, args, base.tokenizer, base.vocab_size, batch_groups(mesh), base.notes)
    train_rows, eval_rows = pipeline.rows()
    train, evaluated = pipeline.loaders(train_rows, eval_rows)
    kind = type_of(train_rows, **method.rows(args))
    told = f"{kind} (told by column {kind.column!r})"
    num_eval_batches = evaluated.num_steps if evaluated else 0
    return Preview(args, base, train.num_steps, num_eval_batches, told, train.batch(0), train.empty(max(train.lengths)))


def show_data(preview: Preview, console: Console) -> None:
    """Print what the rows are, how many steps they make, and the first examples or prompts."""
    console.print(f"rows: {preview.kind}", markup=False)
    for note in preview.base.notes:
        console.print(note, markup=False)
    held_out, data = preview.num_eval_batches, preview.data
    if isinstance(data, tuple):
        _show_prompts(*data, preview, console)
        return
    total = f"{preview.num_steps} steps" + (f", {held_out} batches of evaluation" if held_out else "")
    console.print(f"{total}; a batch is {list(data['tokens'].shape)} on this process")
    is_coloured = console.color_system is not None
    for number, (tokens, loss_mask) in zip(range(1, EXAMPLES + 1), examples_of(data), strict=False):
        trained = int(loss_mask.sum())
        console.rule(f"example {number}: {len(tokens)} tokens, {trained} trained", align="left")
        shown = painted(preview.base.tokenizer, tokens[:SHOWN_TOKENS], loss_mask[:SHOWN_TOKENS], is_coloured)
        _show(shown, len(tokens), console)


def _show_prompts(prompts: Prompts, numbers: Plan, preview: Preview, console: Console) -> None:
    held_out = f", {preview.num_eval_batches} prompts of evaluation" if preview.num_eval_batches else ""
    console.print(
        f"{preview.num_steps} steps{held_out}; a generation is {numbers.num_prompts} prompts with "
        f"{numbers.num_generations} completions each, learned from in {numbers.num_steps} steps"
    )
    columns = [name for name in prompts.columns if name != "prompt"]
    console.print(f"columns for reward functions: {', '.join(columns) or 'none'}", markup=False)
    for number, tokens in enumerate(prompts.tokens[:EXAMPLES], start=1):
        console.rule(f"prompt {number}: {len(tokens)} tokens", align="left")
        _show(Text(preview.base.tokenizer.decode(tokens[:SHOWN_TOKENS]), style="dim"), len(tokens), console)


def _show(text: Text, num_tokens: int, console: Console) -> None:
    console.print(text)
    if num_tokens > SHOWN_TOKENS:
        console.print(f"... and {num_tokens - SHOWN_TOKENS} more tokens", style="dim")


def examples_of(batch: Mapping[str, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
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
