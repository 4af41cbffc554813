"""Prompts to generate from, with what the dataset knows of each beside."""

from typing import Any, NamedTuple

import numpy as np

from jaxpost.data.bad_rows import BadRows
from jaxpost.data.chat import encode_prompt
from jaxpost.data.fingerprint import digest
from jaxpost.data.formats import Block, blocks
from jaxpost.data.rows import RowError, Rows
from jaxpost.errors import DataError


class Prompts(NamedTuple):
    """N prompts.

    Attributes:
        tokens: ids of each, int32 [T].
        columns: cells of the dataset, a list of N by column, `prompt` among them.
        rows: number of each one's row in the dataset, from 0.
    """

    tokens: list[np.ndarray]
    columns: dict[str, list[Any]]
    rows: list[int]

    def digest(self) -> str:
        """Of the tokens, in 32 hexadecimal digits."""
        return digest([len(ids) for ids in self.tokens], np.concatenate(self.tokens).tobytes())


SHORTER = "lower --max_completion_length, or set --on_bad_row skip"


def read_prompts(
    rows: Rows,
    tokenizer: Any,
    *,
    vocab_size: int,
    max_tokens: int,
    bad_rows: BadRows | None = None,
    remedy: str = SHORTER,
) -> Prompts:
    """Read and tokenise the column `prompt`.

    Args:
        rows: of a dataset.
        tokenizer: of the model.
        vocab_size: embedding rows; an id beyond is refused.
        max_tokens: of a prompt; a longer one is a bad row.
        bad_rows: decides what becomes of rows that cannot be used; by default the first one is an error.
        remedy: for one that is too long.

    Raises:
        DataError: no rows, no such column, a bad cell, or nothing that can be used.
        ConfigError: the tokenizer does not fit.
    """
    bad_rows = bad_rows or BadRows()
    found = Prompts([], {}, [])
    for block in blocks(rows, rows.name, bad_rows):
        if "prompt" not in block.columns:
            raise DataError(f"{rows.name}: no column 'prompt'; columns: {', '.join(block.columns)}")
        for i in range(len(block)):
            try:
                tokens = _encode(block, i, tokenizer, vocab_size)
                if len(tokens) > max_tokens:
                    fault = (
                        f"{block.place(i)}: the prompt has {len(tokens):,} tokens, but there is room for {max_tokens:,}"
                    )
                    raise RowError(f"{fault}; {remedy}", "a prompt that is too long")
            except RowError as error:
                bad_rows.refuse(error)
                continue
            for column, cells in block.columns.items():
                known = found.columns.setdefault(column, [None] * len(found.tokens))
                known.append(cells[i])
            found.tokens.append(tokens)
            found.rows.append(block.first + i)
            for column in found.columns.keys() - block.columns.keys():
                found.columns[column].append(None)
    if not found.tokens:
        raise DataError(f"{rows.name} has no prompt that can be used; {bad_rows}")
    return found


def _encode(block: Block, i: int, tokenizer: Any, vocab_size: int) -> np.ndarray:
    cells = {name: block.columns[name][i] for name in ("tools", "chat_template_kwargs") if name in block.columns}
    options = {"vocab_size": vocab_size, "name": block.name, "row": block.first + i}
    return encode_prompt(block.columns["prompt"][i], tokenizer, **options, **cells)
