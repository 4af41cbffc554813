"""Rows to what a run loads: tokenised, stored and, where a method packs, packed."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxpost.data.bad_rows import BadRows
from jaxpost.data.chat import SFTDataConfig, encode_rows
from jaxpost.data.completions import encode_judged, encode_pairs
from jaxpost.data.examples import Counts, Example, LengthConfig, flattened
from jaxpost.data.fingerprint import code_digest, digest, tokenizer_digest
from jaxpost.data.packing import Packs, first_tokens, pack_examples, singles, units
from jaxpost.data.rows import Rows, take
from jaxpost.data.store import Store, stored
from jaxpost.errors import ConfigError, DataError
from jaxpost.options import part_of


class Encoded(NamedTuple):
    """A dataset as a run sees it.

    Attributes:
        packs: examples that stay together in a row.
        full: packs fill rows; they do not share one.
        notes: what became of the rows, for the user.
        mismatch: tokens that a prompt with the completion of another example may have; None where there are none.
    """

    packs: Packs
    full: bool
    notes: list[str]
    mismatch: int | None = None


def encode_sft(
    rows: Rows, tokenizer: Any, config: Any, *, vocab_size: int, training: bool, num_packs: int | None = None
) -> Encoded:
    """Rows of text, messages or prompts with completions, packed if the config says so.

    `num_packs` are enough: rows beyond are not read.
    """
    length = packed_length(config, training)
    data = part_of(config, SFTDataConfig)
    if length and config.packing_strategy != "bfd" and config.on_long_row == "truncate":
        data = dataclasses.replace(data, max_length=None)  # these strategies go on with what is beyond
    name, budget = rows.name, None
    if num_packs is not None:
        rows, budget = (rows, num_packs * length) if length else (take(rows, num_packs), None)

    def examples(**options: Any) -> Iterator[Example]:
        found = encode_rows(rows, tokenizer, data, name=name, **options)
        return found if budget is None else first_tokens(found, budget)

    store, notes = _stored(examples, rows, tokenizer, config, vocab_size, "sft", data, budget)
    if not length:
        return Encoded(singles(store), False, notes)
    packs = pack_examples(store, length, config.packing_strategy)
    notes.append(f"{name}: packed into {len(packs)} rows of up to {length} tokens, {packs.efficiency(length):.1%} full")
    return Encoded(packs, True, notes)


def encode_compared(
    rows: Rows, tokenizer: Any, config: Any, *, vocab_size: int, training: bool, num_packs: int | None = None
) -> Encoded:
    """Preference rows as pairs of examples."""
    shared = bool(config.share_prompts)
    return _encode_units(encode_pairs, 2, "margin", rows, tokenizer, config, vocab_size, num_packs, branches=shared)


def encode_unpaired(
    rows: Rows, tokenizer: Any, config: Any, *, vocab_size: int, training: bool, num_packs: int | None = None
) -> Encoded:
    """Completions that are judged one by one, as examples.

    Raises:
        DataError: all are desirable, or none is.
    """
    encoded = _encode_units(encode_judged, 1, "label", rows, tokenizer, config, vocab_size, num_packs)
    labels = encoded.packs.examples.values
    if training and labels.min() == labels.max():
        kind = "desirable" if labels[0] else "undesirable"
        raise DataError(f"{rows.name}: all {len(labels)} completions are {kind}; this method needs some of either")
    return encoded._replace(mismatch=(config.max_length or sys.maxsize) if config.needs_mismatches else None)


def _encode_units(
    encode: Callable[..., Iterator[tuple[Example, ...]]],
    size: int,
    fact: str,
    rows: Rows,
    tokenizer: Any,
    config: Any,
    vocab_size: int,
    num_packs: int | None,
    *,
    branches: bool = False,
) -> Encoded:
    """Units of so many examples; what the batches tell of each example is its value, by the name `fact`."""
    data = part_of(config, LengthConfig)
    rows = rows if num_packs is None else take(rows, num_packs)

    def examples(**options: Any) -> Iterator[Example]:
        return flattened(encode(rows, tokenizer, data, name=rows.name, **options))

    store, notes = _stored(examples, rows, tokenizer, config, vocab_size, fact, data)
    return Encoded(units(store, size, {fact: store.values}, branches=branches), False, notes)


def _stored(
    examples: Callable[..., Iterator[Example]],
    rows: Rows,
    tokenizer: Any,
    config: Any,
    vocab_size: int,
    *known: Any,
) -> tuple[Store, list[str]]:
    """Examples in the cache of tokenised rows, and what became of the rows; `known` is what else they depend on."""
    counts, bad_rows = Counts(), BadRows(config.on_bad_row)
    identities = rows.identify(), tokenizer_digest(tokenizer)
    key = None if None in identities else digest(code_digest(), *identities, *known, vocab_size, config.on_bad_row)
    store = stored(
        examples(vocab_size=vocab_size, counts=counts, bad_rows=bad_rows),
        lambda: {"rows": dataclasses.asdict(counts), "bad_rows": dict(bad_rows.counts)},
        folder=config.tokenized_cache_dir,
        key=key,
    )
    return store, row_notes(store, rows.name)


def packed_length(config: Any, training: bool) -> int | None:
    """Tokens of a packed row; None where rows are not packed.

    Raises:
        ConfigError: they are to be packed, but into no length.
    """
    if not config.packs(training):
        return None
    if config.max_length is None:
        raise ConfigError("packing fills rows of max_length tokens; give --max_length")
    return config.max_length


def row_notes(store: Store, name: str) -> list[str]:
    """What became of the rows of stored examples."""
    rows, bad_rows = Counts(**store.facts["rows"]), BadRows()
    bad_rows.counts.update(store.facts["bad_rows"])
    long = f", {rows.too_long} too long left out" if rows.too_long else ""
    kept = f"{rows.kept} rows, {rows.dropped} without a token to train dropped, {rows.truncated} truncated{long}"
    return [*([f"{name}: {bad_rows}"] if bad_rows.counts else []), f"{name}: {kept}"]
