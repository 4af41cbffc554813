"""Typed rows to token ids and loss masks: chat templates, what is trained, truncation. The rules are TRL's for SFT."""

import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxpost.data.bad_rows import BadRows
from jaxpost.data.formats import Block, DatasetType, blocks, row_type
from jaxpost.data.rows import RowError
from jaxpost.data.template import Renderer, Span
from jaxpost.errors import ConfigError, DataError
from jaxpost.options import one_of, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

logger = logging.getLogger(__name__)

ACCEPTED: tuple[DatasetType, ...] = ("tokenized", "prompt_completion", "language_modeling", "prompt_only")
_Encoded = list[tuple[np.ndarray, np.ndarray]]  # int32 [T] tokens and bool [T] loss mask of each row
SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON can write one alone, UTF-8 cannot


class Example(NamedTuple):
    """One row, ready to be padded.

    Attributes:
        tokens: int32 [T].
        loss_mask: bool [T]; True where this token is a training target, predicted from the tokens before it. The first
            token has none before it, so it is never one.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass
class Counts:
    """What has become of the rows so far.

    Attributes:
        kept: yielded, cut or not.
        dropped: left out since they have no token to train on.
        truncated: those of the kept that were cut.
        too_long: left out since they are over max_length.
    """

    kept: int = 0
    dropped: int = 0
    truncated: int = 0
    too_long: int = 0


@dataclass(frozen=True, kw_only=True)
class SFTDataConfig:
    """How rows become tokens; TRL's names and defaults."""

    dataset_text_field: str = option("text", "column that holds the text of a language-modelling row")
    max_length: int | None = option(1024, "tokens a row may have (see on_long_row), null for no limit")
    truncation_mode: str = option("keep_start", "which end of a row over max_length to keep: keep_start, keep_end")
    on_long_row: str = option(
        "truncate",
        "what becomes of a row over max_length: truncate (truncation_mode says which end stays), drop or error",
    )
    completion_only_loss: bool | None = option(None, "train on the completion only; null: where rows have a completion")
    assistant_only_loss: bool = option(
        False, "train on assistant turns only, with or without {% generation %} in the chat template"
    )

    def __post_init__(self) -> None:
        one_of("truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))
        one_of("on_long_row", self.on_long_row, ("truncate", "drop", "error"))
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; a row needs at least 2 tokens to train on")


class _Rule(NamedTuple):
    """How the rows of one dataset are read: its type, the column that shows it, whether that holds messages."""

    kind: str
    column: str
    conversational: bool
    config: SFTDataConfig
    tokenizer: "Tokenizer"
    vocab_size: int
    renderer: Renderer

    @property
    def masks_prompts(self) -> bool:
        """Whether only the completions are trained."""
        return self.kind == "prompt_completion" and self.config.completion_only_loss is not False


def encode_rows(
    rows: Any,
    tokenizer: "Tokenizer",
    config: SFTDataConfig,
    *,
    vocab_size: int,
    name: str = "the dataset",
    bad_rows: BadRows | None = None,
    counts: Counts | None = None,
) -> Iterator[Example]:
    """Tokenise rows (what `as_rows` takes) of text, messages or completions, and drop those without a trained token.

    Standard text and completions get the EOS text if they lack it; messages go through the chat template. Rows are read
    a block at a time, as their examples are taken, and `counts` is added to. `vocab_size` is the number of embedding
    rows. `name` stands in messages, where rows are counted from 1. `bad_rows` decides what becomes of rows that cannot
    be used; by default the first one is an error.

    Raises:
        DataError: no rows, wrong columns, a bad cell, or, after the last row, nothing to train on.
        ConfigError: an option, the tokenizer or its chat template does not fit the rows.
    """
    if tokenizer.pad_token_id is not None:
        _check_ids(np.array([tokenizer.pad_token_id]), tokenizer, vocab_size, "padding (--pad_token)")
    bad_rows, counts = bad_rows or BadRows(), counts or Counts()
    rule, seen, kept, mismatched = None, 0, 0, 0
    for block in blocks(rows, name, bad_rows):
        rule = rule or _rule(block, tokenizer, config, vocab_size)
        for part, (encoded, parted) in bad_rows.attempt(block, partial(_encode, rule=rule)):
            mismatched += parted
            seen += len(encoded)
            for i, row in enumerate(encoded):
                _check_ids(row[0], tokenizer, vocab_size, part.place(i))
                example = _fit(*row, part.place(i), rule.config, bad_rows, counts)
                if example is not None:
                    kept += 1
                    yield example
    if not kept:
        found = f"{name}: none of the {seen} rows has a token to train on within max_length {config.max_length}"
        skipped = f"; {bad_rows}" if bad_rows.counts else ""
        raise DataError(f"{found} ({config.truncation_mode}); raise --max_length or check what is masked{skipped}")
    if mismatched:
        found = f"{name}: {mismatched} of {seen} prompts are not the first tokens of their prompt + completion"
        logger.warning(f"{found}; there the completion starts where they part, not where generation would start")


def _encode(block: Block, rule: _Rule) -> tuple[_Encoded, int]:
    """Tokens and masks of a block's rows, and how many prompts are not the first tokens of their rows."""
    if rule.kind == "tokenized":
        return _encode_tokenized(block, rule), 0
    encoded = _encode_whole(block, rule)
    return encoded, _mask_prompts(encoded, block, rule) if rule.masks_prompts else 0


def _fit(
    tokens: np.ndarray, loss_mask: np.ndarray, place: str, config: SFTDataConfig, bad_rows: BadRows, counts: Counts
) -> Example | None:
    """A row of at most max_length tokens, counted; None if it is left out. Its first token is no target."""
    limit, length = config.max_length or sys.maxsize, len(tokens)
    if length > limit:
        if config.on_long_row == "error":
            found = f"{length:,} tokens, more than max_length {limit:,}"
            remedy = "raise --max_length, or set --on_long_row to truncate or drop"
            bad_rows.refuse(RowError(f"{place} has {found}; {remedy}", "more tokens than max_length"))
            return None
        if config.on_long_row == "drop":
            counts.too_long += 1
            return None
        kept = slice(limit) if config.truncation_mode == "keep_start" else slice(-limit, None)
        tokens, loss_mask = tokens[kept].copy(), loss_mask[kept].copy()
    loss_mask[:1] = False
    if not loss_mask.any():
        counts.dropped += 1
        return None
    counts.kept += 1
    counts.truncated += length > limit
    return Example(tokens, loss_mask)


def encode_prompt(
    prompt: str | list[dict],
    tokenizer: "Tokenizer",
    *,
    vocab_size: int,
    name: str = "the dataset",
    row: int = 0,
    tools: Any = None,
    chat_template_kwargs: Any = None,
) -> np.ndarray:
    """Token ids int32 [T] of a prompt to generate from: text as it is, or messages up to the assistant's turn.

    Messages that end with an assistant's are left open for the model to continue. `row` counts from 0; `tools` and
    `chat_template_kwargs` are its cells of these columns.

    Raises:
        DataError: the prompt is not text or messages, or has no tokens; another cell is wrong.
        ConfigError: there is no chat template, or an id is not below `vocab_size`.
    """
    block = Block({"prompt": [prompt], "tools": [tools], "chat_template_kwargs": [chat_template_kwargs]}, row, name)
    if isinstance(prompt, str):
        [(tokens, _)] = _tokenize(block, "prompt", [prompt], tokenizer)
    else:
        messages = block.messages("prompt")
        ends = "continue_final_message" if messages[0][-1]["role"] == "assistant" else "add_generation_prompt"
        texts = Renderer(tokenizer).texts(block, "prompt", messages, **{ends: True})
        [(tokens, _)] = _tokenize(block, "prompt", texts, tokenizer, special=False)
    if len(tokens) == 0:
        raise DataError(f"{block.where(0, 'prompt')} has no tokens to generate from")
    _check_ids(tokens, tokenizer, vocab_size, block.where(0, "prompt"))
    return tokens


def _rule(block: Block, tokenizer: "Tokenizer", config: SFTDataConfig, vocab_size: int) -> _Rule:
    """Find the type of the rows from the first block and check that the options fit it."""
    name, columns = block.name, block.columns
    kind, column, conversational = row_type(block, config.dataset_text_field, ACCEPTED)
    if kind == "prompt_only":
        raise DataError(f"{name} has no column 'completion' to train on beside 'prompt'; found {', '.join(columns)}")
    if kind == "tokenized":
        wanted = {"completion_mask": config.completion_only_loss, "assistant_masks": config.assistant_only_loss}
        for mask in (m for m in wanted if wanted[m] and m not in columns and "labels" not in columns):
            raise ConfigError(f"{name} needs a column {mask!r} or 'labels' to train on only that part of 'input_ids'")
        if config.completion_only_loss is None and "completion_mask" in columns and "labels" not in columns:
            logger.warning(f"{name}: completion_mask does not count; for that set completion_only_loss to true")
        return _Rule(kind, "input_ids", False, config, tokenizer, vocab_size, Renderer(tokenizer))
    if kind == "language_modeling" and config.completion_only_loss:
        raise ConfigError(f"completion_only_loss needs columns 'prompt' and 'completion'; {name} has {column!r}")
    if config.assistant_only_loss:
        if not conversational:
            raise ConfigError(f"assistant_only_loss needs messages with roles, not the text of column {column!r}")
        if not tokenizer.is_fast:
            raise ConfigError("assistant_only_loss needs a fast tokenizer (tokenizer.json)")
    if not conversational and tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no EOS token to end the text with; name one with --eos_token")
    return _Rule(kind, column, conversational, config, tokenizer, vocab_size, Renderer(tokenizer))


def _encode_tokenized(block: Block, rule: _Rule) -> _Encoded:
    """Rows that bring their ids: `labels` decide as they are, else the masks do, `completion_mask` only when asked."""
    masks = ("completion_mask", "assistant_masks") if rule.config.completion_only_loss else ("assistant_masks",)
    encoded = []
    for i in range(len(block.columns["input_ids"])):
        ids = block.integers("input_ids", i, rule.vocab_size)
        if "labels" in block.columns:
            mask = block.label_mask(i, ids, rule.vocab_size)
        else:
            mask = np.ones(len(ids), bool)
            for column in set(masks) & set(block.columns):
                mask &= block.integers(column, i, 2, len(ids)) == 1
        encoded.append((ids.astype(np.int32), mask))
    return encoded


def _encode_whole(block: Block, rule: _Rule) -> _Encoded:
    """Whole rows, trained throughout, or where the assistant speaks if assistant_only_loss."""
    columns = ["prompt", "completion"] if rule.kind == "prompt_completion" else [rule.column]
    column, tokenizer = columns[-1], rule.tokenizer
    if not rule.conversational:
        eos, parts = str(tokenizer.eos_token), zip(*(block.texts(column) for column in columns), strict=True)
        texts = ["".join(row) + ("" if row[-1].endswith(eos) else eos) for row in parts]
        return _tokenize(block, column, texts, tokenizer)
    parts = [block.messages(column) for column in columns]
    whole = [[message for part in row for message in part] for row in zip(*parts, strict=True)]
    rule.renderer.warn_of_unused(block, column, whole)
    if not rule.config.assistant_only_loss:
        return _tokenize(block, column, rule.renderer.texts(block, column, whole), tokenizer, special=False)
    first = [len(prompt) if rule.masks_prompts else 0 for prompt in parts[0]]
    texts, spans = rule.renderer.spans(block, column, whole, first)
    return _tokenize(block, column, texts, tokenizer, special=False, spans=spans)


def _mask_prompts(encoded: _Encoded, block: Block, rule: _Rule) -> int:
    """Clear the masks up to the completion: tokens shared with the prompt alone. Returns how many prompts differ."""
    prompts, differing = block.columns["prompt"], 0
    if rule.conversational:
        prompts = rule.renderer.texts(block, "prompt", block.messages("prompt"), add_generation_prompt=True)
    alone = _tokenize(block, "prompt", prompts, rule.tokenizer, special=not rule.conversational)
    for (prompt, _), (ids, mask) in zip(alone, encoded, strict=True):
        shared = min(len(prompt), len(ids))
        start = int(np.argmin(np.append(prompt[:shared] == ids[:shared], False)))  # where they part
        differing += start < len(prompt)
        mask[:start] = False
    return differing


def _tokenize(
    block: Block,
    column: str,
    texts: list[str],
    tokenizer: "Tokenizer",
    special: bool = True,
    spans: list[list[Span]] | None = None,
) -> _Encoded:
    """The rows' texts as tokens, with BOS and the like if `special`; `spans`, if given, are what is trained."""
    for i, text in enumerate(texts):
        if not text.isascii() and (lone := SURROGATE.search(text)):
            raise block.error(i, column, " has half of a character (a surrogate)", f": {lone.group()!a}")
    tracks = spans is not None
    encoding = tokenizer(texts, add_special_tokens=special, return_offsets_mapping=tracks, verbose=False)
    tokens = [np.array(ids, np.int32) for ids in encoding["input_ids"]]
    masks = [np.full(len(ids), not tracks) for ids in tokens]
    for mask, row_spans, offsets in zip(masks, spans, encoding["offset_mapping"], strict=True) if spans else ():
        starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        for start, end in row_spans:  # a token that shares a character with the span belongs to it
            mask |= (starts < end) & (ends > start)
    return list(zip(tokens, masks, strict=True))


def _check_ids(ids: np.ndarray, tokenizer: "Tokenizer", vocab_size: int, what: str) -> None:
    """Raise if the tokenizer gives an id that the model has no embedding for."""
    if len(ids) and ids.max() >= vocab_size:
        found = f"{what}: token id {ids.max()} from a tokenizer of {len(tokenizer)} tokens"
        raise ConfigError(f"{found}, but the model has {vocab_size} embedding rows; use the model's own tokenizer")
