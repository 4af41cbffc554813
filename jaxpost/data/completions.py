"""Completions that are compared (preference rows) or judged (unpaired ones) as examples; the rules are TRL's.

An example is the prompt with one completion, of which the completion counts.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpost.data.chat import Encoded, Rule, check_padding, completion_rule, encode_block
from jaxpost.data.examples import Example, LengthConfig, Reader, Reading, Unit, read_examples
from jaxpost.data.formats import Block, DatasetType, row_type
from jaxpost.data.preference import Said, judged, pairs
from jaxpost.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

COMPARED: tuple[DatasetType, ...] = ("preference",)
JUDGED: tuple[DatasetType, ...] = ("unpaired_preference", "preference")


def encode_pairs(rows: Any, tokenizer: "Tokenizer", config: LengthConfig, **options: Any) -> Iterator[Unit]:
    """Units of two examples, chosen and rejected; the value of the first is the row's `margin`, 0 without one.

    Arguments and errors are those of `encode_judged`.
    """
    return _encode(_read_pairs, COMPARED, rows, tokenizer, config, **options)


def encode_judged(rows: Any, tokenizer: "Tokenizer", config: LengthConfig, **options: Any) -> Iterator[Unit]:
    """Units of one example, whose value is 1 where it is desirable and 0 where it is not.

    Pairs are taken apart, in the order of `unpair_preference` a block.

    Args:
        rows: what `as_rows` takes.
        tokenizer: of the model.
        config: what becomes of long rows.
        options: `vocab_size`, the number of embedding rows, and `name`, `bad_rows` and `counts` of `read_examples`.

    Raises:
        ConfigError, DataError: as `read_examples`.
    """
    return _encode(_read_judged, JUDGED, rows, tokenizer, config, **options)


def _encode(
    read: Any,
    accepted: tuple[DatasetType, ...],
    rows: Any,
    tokenizer: "Tokenizer",
    config: LengthConfig,
    *,
    vocab_size: int,
    **options: Any,
) -> Iterator[Unit]:
    check_padding(tokenizer, vocab_size)

    def open_reader(block: Block) -> Reader:
        kind = row_type(block, accepted=accepted)
        return partial(read, rule=completion_rule(kind.conversational, tokenizer, vocab_size))

    return read_examples(rows, open_reader, config, **options)


def _read_pairs(block: Block, rule: Rule) -> Reading:
    found, count = pairs(block, rule.conversational), len(block)
    margins = block.numbers("margin") if "margin" in block.columns else [0.0] * count
    for i, pair in enumerate(found):
        if pair.chosen == pair.rejected:
            raise block.error(i, "rejected", " is the same as 'chosen'")
    prompts, completions = [pair.prompt for pair in found] * 2, [pair.chosen for pair in found]
    completions += [pair.rejected for pair in found]
    encoded, parted = _encode_completions(block, rule, prompts, completions, ["chosen"] * count + ["rejected"] * count)
    units = []
    for i, (chosen, rejected) in enumerate(zip(encoded[:count], encoded[count:], strict=True)):
        start = min(_start(chosen[1]), _start(rejected[1]))  # a token of the prompt that one has merged is in neither
        for _, mask in (chosen, rejected):
            mask[start:] = True
        units.append((i, (Example(*chosen, margins[i]), Example(*rejected))))
    return Reading(units, parted)


def _read_judged(block: Block, rule: Rule) -> Reading:
    found, count = judged(block, rule.conversational), len(block)
    paired = "chosen" in block.columns
    columns = ["chosen" if row.label else "rejected" for row in found] if paired else ["completion"] * count
    prompts, completions = [row.prompt for row in found], [row.completion for row in found]
    encoded, parted = _encode_completions(block, rule, prompts, completions, columns)
    examples = (Example(*row, float(judgement.label)) for row, judgement in zip(encoded, found, strict=True))
    return Reading([(i % count, (example,)) for i, example in enumerate(examples)], parted)


def _encode_completions(
    block: Block, rule: Rule, prompts: list[Said], completions: list[Said], columns: list[str]
) -> tuple[Encoded, int]:
    """Tokens and masks of prompts with completions, which the block's rows have in these columns, once or twice."""
    times = len(prompts) // len(block)
    cells = {name: block.cells(name) * times for name in ("tools", "chat_template_kwargs") if name in block.columns}
    rows = [
        Row({}, block.place(i % len(block)), {**_aliases(block, i % len(block)), "completion": column})
        for i, column in enumerate(columns)
    ]
    parts = replace(block, columns={"prompt": prompts, "completion": completions, **cells}, rows=rows)
    return encode_block(parts, rule)


def _aliases(block: Block, i: int) -> dict[str, str]:
    return dict(block.rows[i].aliases) if block.rows else {}


def _start(mask: np.ndarray) -> int:
    """Where the completion begins: the first True, or the end."""
    return int(np.argmax(np.append(mask, True)))
