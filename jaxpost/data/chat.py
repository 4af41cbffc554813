"""Typed rows to token ids and loss masks: chat templates, what is trained, truncation. The rules are TRL's for SFT."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxpost.data.examples import Example, LengthConfig, Reader, Reading, common_prefix, flattened, read_examples
from jaxpost.data.formats import Block, DatasetType, row_type
from jaxpost.data.template import Renderer, Span
from jaxpost.errors import ConfigError, DataError
from jaxpost.options import Group, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

logger = logging.getLogger(__name__)

ACCEPTED: tuple[DatasetType, ...] = ("tokenized", "prompt_completion", "language_modeling", "prompt_only")
Encoded = list[tuple[np.ndarray, np.ndarray]]  # int32 [T] tokens and bool [T] loss mask of each row
SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON can write one alone, UTF-8 cannot


@dataclass(frozen=True, kw_only=True)
class SFTDataConfig(LengthConfig):
    """How rows become tokens; TRL's names and defaults."""

    help_group = Group.DATA

    dataset_text_field: str = option("text", "Column that holds the text of a language-modelling row.")
    completion_only_loss: bool | None = option(
        None, "Train on the completion only; null: where rows have a completion."
    )
    assistant_only_loss: bool = option(
        False, "Train on assistant turns only, with or without {% generation %} in the chat template."
    )


class Rule(NamedTuple):
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
    **options: Any,
) -> Iterator[Example]:
    """Tokenise rows (what `as_rows` takes) of text, messages or completions, and drop those without a trained token.

    Standard text and completions get the EOS text if they lack it; messages go through the chat template. `vocab_size`
    is the number of embedding rows; `options` are `name`, `bad_rows` and `counts` of `read_examples`, whose errors are
    raised.
    """
    check_padding(tokenizer, vocab_size)

    def open_reader(block: Block) -> Reader:
        return partial(_read, rule=_rule(block, tokenizer, config, vocab_size))

    return flattened(read_examples(rows, open_reader, config, **options))


def check_padding(tokenizer: "Tokenizer", vocab_size: int) -> None:
    """Raise ConfigError if the model has no embedding for the padding token."""
    if tokenizer.pad_token_id is not None:
        _check_ids(np.array([tokenizer.pad_token_id]), tokenizer, vocab_size, "padding (--pad_token)")


def completion_rule(conversational: bool, tokenizer: "Tokenizer", vocab_size: int) -> Rule:
    """How prompts with completions are read where the completions alone count."""
    _check_end(conversational, tokenizer)
    config = SFTDataConfig(completion_only_loss=True)
    return Rule("prompt_completion", "completion", conversational, config, tokenizer, vocab_size, Renderer(tokenizer))


def encode_block(block: Block, rule: Rule) -> tuple[Encoded, int]:
    """Tokens and masks of a block's rows, and how many prompts are not the first tokens of their rows."""
    if rule.kind == "tokenized":
        encoded, parted = _encode_tokenized(block, rule), 0
    else:
        encoded = _encode_whole(block, rule)
        parted = _mask_prompts(encoded, block, rule) if rule.masks_prompts else 0
    for i, (tokens, _) in enumerate(encoded):
        _check_ids(tokens, rule.tokenizer, rule.vocab_size, block.place(i))
    return encoded, parted


def _read(block: Block, rule: Rule) -> Reading:
    encoded, parted = encode_block(block, rule)
    return Reading([(i, (Example(*row),)) for i, row in enumerate(encoded)], parted)


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


def _rule(block: Block, tokenizer: "Tokenizer", config: SFTDataConfig, vocab_size: int) -> Rule:
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
        return Rule(kind, "input_ids", False, config, tokenizer, vocab_size, Renderer(tokenizer))
    if kind == "language_modeling" and config.completion_only_loss:
        raise ConfigError(f"completion_only_loss needs columns 'prompt' and 'completion'; {name} has {column!r}")
    if config.assistant_only_loss:
        if not conversational:
            raise ConfigError(f"assistant_only_loss needs messages with roles, not the text of column {column!r}")
        if not tokenizer.is_fast:
            raise ConfigError("assistant_only_loss needs a fast tokenizer (tokenizer.json)")
    _check_end(conversational, tokenizer)
    return Rule(kind, column, conversational, config, tokenizer, vocab_size, Renderer(tokenizer))


def _check_end(conversational: bool, tokenizer: "Tokenizer") -> None:
    if not conversational and tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no EOS token to end the text with; name one with --eos_token")


def _encode_tokenized(block: Block, rule: Rule) -> Encoded:
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


def _encode_whole(block: Block, rule: Rule) -> Encoded:
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


def _mask_prompts(encoded: Encoded, block: Block, rule: Rule) -> int:
    """Clear the masks up to the completion: tokens shared with the prompt alone. Returns how many prompts differ."""
    prompts, differing = block.columns["prompt"], 0
    if rule.conversational:
        prompts = rule.renderer.texts(block, "prompt", block.messages("prompt"), add_generation_prompt=True)
    alone = _tokenize(block, "prompt", prompts, rule.tokenizer, special=not rule.conversational)
    for (prompt, _), (ids, mask) in zip(alone, encoded, strict=True):
        start = common_prefix(prompt, ids)
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
) -> Encoded:
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
