"""Typed rows to token ids and loss masks: chat templates, what is trained, truncation. The rules are TRL's for SFT."""

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxpost.data.bad_rows import BadRows
from jaxpost.data.formats import Block, DatasetType, blocks, row_type
from jaxpost.data.tokenizer import default_template
from jaxpost.errors import ConfigError, DataError, one_line
from jaxpost.options import one_of, option

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer

    Rows = Dataset | Sequence[Mapping[str, Any]]

logger = logging.getLogger(__name__)

ACCEPTED: tuple[DatasetType, ...] = ("tokenized", "prompt_completion", "language_modeling", "prompt_only")
_Encoded = list[tuple[np.ndarray, np.ndarray]]  # int32 [T] tokens and bool [T] loss mask of each row
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TEMPLATE_REMEDY = "give one with --chat_template_path (a .jinja file, or a model that has one)"


class Example(NamedTuple):
    """One row, ready to be padded.

    Attributes:
        tokens: int32 [T].
        loss_mask: bool [T]; True where this token is a training target, predicted from the tokens before it. The first
            token has none before it, so it is never one.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


class Counts(NamedTuple):
    """What became of the rows: `kept` + `dropped` (no target left) are all; `truncated` of the kept were cut."""

    kept: int
    dropped: int
    truncated: int


@dataclass(frozen=True, kw_only=True)
class SFTDataConfig:
    """How rows become tokens; TRL's names and defaults."""

    dataset_text_field: str = option("text", "column that holds the text of a language-modelling row")
    max_length: int | None = option(1024, "tokens a row may have; longer rows are cut, null for no limit")
    truncation_mode: str = option("keep_start", "which end of a row over max_length to keep: keep_start, keep_end")
    completion_only_loss: bool | None = option(None, "train on the completion only; null: where rows have a completion")
    assistant_only_loss: bool = option(False, "train on assistant turns only ({% generation %} in the chat template)")

    def __post_init__(self) -> None:
        one_of("truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))
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


def encode_rows(
    rows: "Rows",
    tokenizer: "Tokenizer",
    config: SFTDataConfig,
    *,
    vocab_size: int,
    name: str = "the dataset",
    bad_rows: BadRows | None = None,
) -> tuple[list[Example], Counts]:
    """Tokenise rows of text, messages or completions, in order, and drop those without a trained token.

    Standard text and completions get the EOS text if they lack it; messages go through the chat template. `vocab_size`
    is the number of embedding rows. `name` stands in messages, where rows are counted from 1. `bad_rows` decides what
    becomes of rows that cannot be used; by default the first one is an error.

    Raises:
        DataError: no rows, wrong columns, a bad cell, or nothing left to train on.
        ConfigError: an option, the tokenizer or its chat template does not fit the rows.
    """
    if tokenizer.pad_token_id is not None:
        _check_ids(np.array([tokenizer.pad_token_id]), tokenizer, vocab_size, "padding (--pad_token)")
    bad_rows = bad_rows or BadRows()
    examples, rule, seen, truncated, mismatched = [], None, 0, 0, 0
    for block in blocks(rows, name, bad_rows):
        rule = rule or _rule(block, tokenizer, config, vocab_size)
        for part, (encoded, parted) in bad_rows.attempt(block, partial(_encode, rule=rule)):
            mismatched += parted
            seen += len(encoded)
            for i, row in enumerate(encoded):
                _check_ids(row[0], tokenizer, vocab_size, part.place(i))
                example = _truncate(*row, config)
                if example.loss_mask.any():
                    examples.append(example)
                    truncated += len(example.tokens) < len(row[0])
    if not examples:
        found = f"{name}: none of the {seen} rows has a token to train on within max_length {config.max_length}"
        raise DataError(f"{found} ({config.truncation_mode}); raise --max_length or check what is masked")
    if mismatched:
        found = f"{name}: {mismatched} of {seen} prompts are not the first tokens of their prompt + completion"
        logger.warning(f"{found}; there the completion starts where they part, not where generation would start")
    return examples, Counts(len(examples), seen - len(examples), truncated)


def _encode(block: Block, rule: _Rule) -> tuple[_Encoded, int]:
    """Tokens and masks of a block's rows, and how many prompts are not the first tokens of their rows."""
    if rule.kind == "tokenized":
        return _encode_tokenized(block, rule), 0
    encoded = _encode_whole(block, rule)
    masks = rule.kind == "prompt_completion" and rule.config.completion_only_loss is not False
    return encoded, _mask_prompts(encoded, block, rule) if masks else 0


def _truncate(tokens: np.ndarray, loss_mask: np.ndarray, config: SFTDataConfig) -> Example:
    """The end that is kept of a row; its first token is no target."""
    limit = config.max_length or sys.maxsize
    kept = slice(limit) if config.truncation_mode == "keep_start" else slice(-limit, None)
    if len(tokens) > limit:
        tokens, loss_mask = tokens[kept].copy(), loss_mask[kept].copy()
    loss_mask[:1] = False
    return Example(tokens, loss_mask)


def encode_prompt(
    prompt: str | list[dict], tokenizer: "Tokenizer", *, vocab_size: int, name: str = "the dataset", row: int = 0
) -> np.ndarray:
    """Token ids int32 [T] of a prompt to generate from: text as it is, or messages up to the assistant's turn.

    Messages that end with an assistant's are left open for the model to continue. `row` counts from 0.

    Raises:
        DataError: the prompt is not text or messages, or has no tokens.
        ConfigError: there is no chat template, or an id is not below `vocab_size`.
    """
    block = Block({"prompt": [prompt]}, row, name)
    if isinstance(prompt, str):
        [(tokens, _)] = _tokenize([prompt], tokenizer)
    else:
        messages = block.messages("prompt")
        ends = "continue_final_message" if messages[0][-1]["role"] == "assistant" else "add_generation_prompt"
        texts, _ = _render(messages, tokenizer, block, "prompt", **{ends: True})
        [(tokens, _)] = _tokenize(texts, tokenizer, special=False)
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
        return _Rule(kind, "input_ids", False, config, tokenizer, vocab_size)
    if kind == "language_modeling" and config.completion_only_loss:
        raise ConfigError(f"completion_only_loss needs columns 'prompt' and 'completion'; {name} has {column!r}")
    if config.assistant_only_loss:
        if not conversational:
            raise ConfigError(f"assistant_only_loss needs messages with roles, not the text of column {column!r}")
        if not GENERATION.search(_template(tokenizer)):
            raise ConfigError(f"assistant_only_loss needs a chat template with {{% generation %}}; {TEMPLATE_REMEDY}")
        if not tokenizer.is_fast:
            raise ConfigError("assistant_only_loss needs a fast tokenizer (tokenizer.json)")
    if not conversational and tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no EOS token to end the text with; name one with --eos_token")
    return _Rule(kind, column, conversational, config, tokenizer, vocab_size)


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
    """Whole rows, trained throughout, or within {% generation %} if assistant_only_loss."""
    columns = ["prompt", "completion"] if rule.kind == "prompt_completion" else [rule.column]
    if rule.conversational:
        parts = zip(*(block.messages(column) for column in columns), strict=True)
        whole = [[message for part in row for message in part] for row in parts]
        texts, spans = _render(whole, rule.tokenizer, block, columns[-1], track=rule.config.assistant_only_loss)
        return _tokenize(texts, rule.tokenizer, special=False, spans=spans)
    eos, parts = str(rule.tokenizer.eos_token), zip(*(block.texts(column) for column in columns), strict=True)
    return _tokenize(["".join(row) + ("" if row[-1].endswith(eos) else eos) for row in parts], rule.tokenizer)


def _mask_prompts(encoded: _Encoded, block: Block, rule: _Rule) -> int:
    """Clear the masks up to the completion: tokens shared with the prompt alone. Returns how many prompts differ."""
    prompts, differing = block.columns["prompt"], 0
    if rule.conversational:
        prompts, _ = _render(block.messages("prompt"), rule.tokenizer, block, "prompt", add_generation_prompt=True)
    alone = _tokenize(prompts, rule.tokenizer, special=not rule.conversational)
    for (prompt, _), (ids, mask) in zip(alone, encoded, strict=True):
        shared = min(len(prompt), len(ids))
        start = int(np.argmin(np.append(prompt[:shared] == ids[:shared], False)))  # where they part
        differing += start < len(prompt)
        mask[:start] = False
    return differing


def _tokenize(texts: list[str], tokenizer: "Tokenizer", special: bool = True, spans: list | None = None) -> _Encoded:
    """Whole texts as tokens, with BOS and the like if `special`; `spans`, if given, are the trained characters."""
    encoding = tokenizer(texts, add_special_tokens=special, return_offsets_mapping=spans is not None, verbose=False)
    tokens = [np.array(ids, np.int32) for ids in encoding["input_ids"]]
    masks = [np.full(len(ids), spans is None) for ids in tokens]
    for mask, row_spans, offsets in zip(masks, spans, encoding["offset_mapping"], strict=True) if spans else ():
        starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        for start, end in row_spans:  # a token that shares a character with the span belongs to it
            mask |= (starts < end) & (ends > start)
    return list(zip(tokens, masks, strict=True))


def _render(
    chats: list[list[dict]], tokenizer: "Tokenizer", block: Block, column: str, track: bool = False, **kwargs: Any
) -> tuple[list[str], list[list[tuple[int, int]]] | None]:
    """The text of each conversation and, if `track`, the character ranges of its {% generation %} blocks."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    template, texts, spans = _template(tokenizer), [], []
    special: dict[str, Any] = tokenizer.special_tokens_map
    for i, chat in enumerate(chats):
        try:
            if track:
                found = render_jinja_template([chat], None, None, template, True, **special)
                texts += found[0]
                spans += found[1]
            else:
                texts.append(tokenizer.apply_chat_template(chat, tokenize=False, **kwargs))
        except TemplateSyntaxError as error:
            raise ConfigError(f"line {error.lineno} of the chat template is not Jinja: {one_line(error)}") from error
        except (TemplateError, TypeError, ValueError) as error:
            raise block.error(i, column, ": the chat template refuses it", f": {one_line(error)}") from error
    return texts, spans if track else None


def _template(tokenizer: "Tokenizer") -> str:
    """The tokenizer's chat template, which conversations cannot do without."""
    template = default_template(tokenizer)
    if template is None:
        raise ConfigError(f"the tokenizer has no chat template, and the rows hold messages; {TEMPLATE_REMEDY}")
    return template


def _check_ids(ids: np.ndarray, tokenizer: "Tokenizer", vocab_size: int, what: str) -> None:
    """Raise if the tokenizer gives an id that the model has no embedding for."""
    if len(ids) and ids.max() >= vocab_size:
        found = f"{what}: token id {ids.max()} from a tokenizer of {len(tokenizer)} tokens"
        raise ConfigError(f"{found}, but the model has {vocab_size} embedding rows; use the model's own tokenizer")
