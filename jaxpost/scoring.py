"""What a reward model gives to texts: `jaxpost evaluate` without a method, and `score` in Python."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxpost.compilation import keep_programs
from jaxpost.completer import LoadConfig, check_least
from jaxpost.data.chat import SFTDataConfig, encode_rows
from jaxpost.data.completions import COMPARED, encode_pairs
from jaxpost.data.examples import Counts, Example, LengthConfig, flattened
from jaxpost.data.loader import Loader
from jaxpost.data.mixture import type_of
from jaxpost.data.packing import units
from jaxpost.data.rows import Rows, as_rows
from jaxpost.data.sources import load_rows
from jaxpost.data.store import Store, stored
from jaxpost.data.tokenizer import embedding_rows
from jaxpost.errors import ConfigError, DataError
from jaxpost.metrics import wilson_interval
from jaxpost.models.config import Compute
from jaxpost.models.pretrained import open_source
from jaxpost.models.transformer import Decoder
from jaxpost.objectives.base import Batch
from jaxpost.objectives.sequences import rewards_of
from jaxpost.options import option
from jaxpost.sharding import batch_groups, make_mesh
from jaxpost.train.evaluate import by_example
from jaxpost.writing import write_lines

SCORED = ("tokenized", "prompt_completion", "language_modeling")
LENGTHS = 8  # of rows, that are compiled
TEXT = SFTDataConfig(completion_only_loss=False, max_length=None)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(LoadConfig):
    """What is evaluated, and how texts are scored."""

    dataset_name: str | None = option(None, "Texts, messages, prompts with completions, or pairs: a file or hub id.")
    dataset_split: str = option("train", "Split of the dataset.")
    output_file: str | None = option(None, "JSON Lines file for the rows with their scores; by default the terminal.")
    max_length: int | None = option(None, "Tokens of a text that are read, from its start; null for all.")
    batch_size: int = option(8, "Texts (or pairs) that a device reads together.")
    allow_untrained_head: bool = option(False, "Score even with a model without a trained reward head: at random.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "max_length", "batch_size")


def run_score(config: ScoreConfig) -> None:
    """Write the rows of a dataset with their `score`, or `chosen_score` and `rejected_score`, and sum these up.

    Raises:
        ConfigError, DataError: a flag, the model or a row cannot be used; nothing is written.
    """
    rows = load_rows(str(config.dataset_name), config.dataset_split)
    source = open_source(str(config.model_name_or_path), config.model_revision)
    if not source.has_trained_head("reward") and not config.allow_untrained_head:
        raise ConfigError(
            f"{config.model_name_or_path} has no trained reward head, so its scores would be random; train one with "
            "jaxpost reward, or say what to evaluate a language model by: --reward_funcs, --judge or --tasks "
            "(--allow_untrained_head scores at random)"
        )
    keep_programs(config)
    mesh = make_mesh(config.mesh)
    options = {"dtype": config.dtype, "compute": Compute(dtype=config.dtype), "mesh": mesh}
    model = source.load(head="reward", allow_nonfinite=config.allow_nonfinite_weights, **options)
    tokenizer, size = source.tokenizer(), config.batch_size
    scores = score(model, tokenizer, rows, max_length=config.max_length, batch_size=size, mesh=mesh)
    names = ("score",) if scores.ndim == 1 else ("chosen_score", "rejected_score")
    columns = scores.reshape(len(scores), -1)
    write_lines(
        config.output_file,
        (
            json.dumps({**row, **dict(zip(names, map(float, values), strict=True))}, ensure_ascii=False, default=str)
            for row, values in zip(rows, columns, strict=True)
        ),
    )
    for line in summary(scores):
        print(line, file=sys.stderr)


def summary(scores: np.ndarray) -> list[str]:
    """What scores are like, and of pairs how often the chosen one is higher."""
    lines = [f"{len(scores)} rows, mean score {scores.mean():.4g}, from {scores.min():.4g} to {scores.max():.4g}"]
    if scores.ndim == 2:
        right = int(np.sum(scores[:, 0] > scores[:, 1]))
        low, high = wilson_interval(right, len(scores))
        share = f"{right / len(scores):.1%} (95 % interval {low:.1%} to {high:.1%})"
        lines.append(f"the chosen one has the higher score in {right} of {len(scores)} pairs, {share}")
    return lines


def score(
    model: Decoder,
    tokenizer: Any,
    rows: Rows | Sequence[dict[str, Any]],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """The score of every text, at its last token.

    Args:
        model: of `from_pretrained(path, head="reward")`.
        tokenizer: of the model; its chat template makes texts of messages.
        rows: dicts or a `datasets.Dataset` with text, messages, prompt and completion, or chosen and rejected.
        max_length: tokens of a text that are read, from its start; None for all.
        batch_size: texts (or pairs) that a device reads together.
        mesh: where the model is; by default the first device.

    Returns:
        float32 [N], or [N, 2] of the chosen and the rejected of pairs.

    Raises:
        ConfigError: the model has no reward head.
        DataError: a row cannot be read; it is named.
    """
    if model.head_kind != "reward":
        raise ConfigError('score needs a reward model; load it with from_pretrained(path, head="reward")')
    rows = as_rows(rows, "the rows")
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    is_paired = type_of(rows, accepted=(*COMPARED, *SCORED)).kind in COMPARED
    vocab_size = embedding_rows(tokenizer, model.config.vocab_size)
    store = stored(_examples(rows, tokenizer, is_paired, max_length, vocab_size=vocab_size))
    scores = each_of(store, rewards_of_all, model, batch_size=batch_size, mesh=mesh, unit=2 if is_paired else 1)
    return scores.reshape(-1, 2) if is_paired else scores


def rewards_of_all(model: Any, batch: Batch) -> jax.Array:
    """What a reward model gives each example, [B, S]."""
    return rewards_of(model, batch)[0]


def each_of(
    store: Store,
    says: Callable[[Any, Batch], Any],
    model: Decoder,
    *,
    batch_size: int,
    mesh: Mesh,
    unit: int = 1,
) -> Any:
    """What is said of every example, float32 [N, ...].

    Args:
        store: the examples, at least one.
        says: (model, batch) -> [B, S, ...], or a tree of such; a function that has a name, which is compiled once.
        model: that the examples are shown to.
        batch_size: examples, or units of them, that a device reads together.
        mesh: where the model is.
        unit: examples that stay together.
    """
    processes = sorted({device.process_index for device in mesh.devices.flat})
    packs, num_rows = units(store, unit, {}), batch_groups(mesh)
    size = batch_size * num_rows
    steps = -(-len(packs) // size)
    loader = Loader(
        packs,
        global_batch_size=size,
        num_rows=num_rows,
        num_steps=steps,
        pad_id=0,
        seed=0,
        sampling="sequential",
        num_lengths=min(LENGTHS, steps),
        multiple=64,
        process_index=processes.index(jax.process_index()),
        process_count=len(processes),
    )
    graphdef, weights = nnx.split(model)
    with jax.set_mesh(mesh):
        return by_example(partial(_program(graphdef, says), weights), loader, mesh)


@lru_cache(maxsize=8)
def _program(graphdef: Any, says: Callable[[Any, Batch], Any]) -> Callable[[Any, Batch], Any]:
    return jax.jit(lambda weights, batch: says(nnx.merge(graphdef, weights), batch))


def _examples(rows: Rows, tokenizer: Any, is_paired: bool, max_length: int | None, **options: Any) -> Iterator[Example]:
    """The texts of rows, each cut to its first tokens; a row without a text is an error, for each has its score."""
    counts, per_row = Counts(), 2 if is_paired else 1
    shared = {"name": rows.name, "counts": counts, **options}
    if is_paired:
        found = flattened(encode_pairs(rows, tokenizer, LengthConfig(max_length=None), **shared))
    else:
        found = encode_rows(rows, tokenizer, TEXT, **shared)
    number = 0
    for number, example in enumerate(found):
        _check_whole(counts, rows.name, number // per_row)
        yield Example(example.tokens[:max_length], example.loss_mask[:max_length])
    _check_whole(counts, rows.name, number // per_row + 1)


def _check_whole(counts: Counts, name: str, before: int) -> None:
    if counts.dropped:
        raise DataError(
            f"{name}, row {before + 1} has fewer than 2 tokens, or no completion: there is nothing to score"
        )
