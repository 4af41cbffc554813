"""Rows that cannot be used: an error, or left out and counted."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from jaxpost.data.rows import RowError

if TYPE_CHECKING:
    from jaxpost.data.formats import Block

T = TypeVar("T")


class BadRows:
    """What becomes of rows that cannot be used: the first one ends the run, or each is left out and counted.

    Attributes:
        counts: rows that were left out, by the reason.
    """

    def __init__(self, on_bad_row: str = "error") -> None:
        self._skips, self.counts = on_bad_row == "skip", Counter[str]()

    def refuse(self, error: RowError) -> None:
        """Raise the error, or count the row as left out."""
        if not self._skips:
            raise error
        self.counts[error.reason] += 1

    def attempt(self, block: "Block", encode: "Callable[[Block], T]") -> "list[tuple[Block, T]]":
        """Blocks of the rows that `encode` takes, in order, and what it makes of each; mostly the one whole block.

        `encode` raises a RowError (`Block.error`) for a row that cannot be used. Half of the rows are then tried, and
        the other half, down to single rows, so that what is costly is done in few batches.
        """
        try:
            return [(block, encode(block))]
        except RowError as error:
            if not self._skips or len(block) == 1:
                self.refuse(error)
                return []
        middle = len(block) // 2
        halves = (block.part(0, middle), block.part(middle, len(block)))
        return [found for half in halves for found in self.attempt(half, encode)]

    def __str__(self) -> str:
        """As in `3 rows skipped: 2 x column 'text' must be text, 1 x not valid UTF-8`."""
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.counts.most_common())
        return f"{self.counts.total()} rows skipped: {reasons}" if reasons else "no rows skipped"
