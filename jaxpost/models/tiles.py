"""The tiles of scores that the plain attention goes through, a tile of queries after the other.

On CPU a tile of queries has its keys at once wherever what it sees is near. That is faster than tile by tile, and each
query's weights are then one sum, as they are where a token is decoded: both give the same to the bit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

from jaxpost.models.views import Views, needed_tiles
from jaxpost.platform import platform

BLOCK = 128  # tokens of a tile
WIDE = 512  # keys that XLA on CPU sums at once
STEP = 64  # of the lengths of short rows there: a product of fewer than 48 columns is summed in another order


class Span(NamedTuple):
    """Tokens that follow each other in a row."""

    begin: Int[Array, ""] | int
    size: int


Step = Callable[[Span, Any], Any]  # (keys, carry) -> carry
Columns = Callable[[Step, Any], Any]  # takes the step through the keys that a tile of queries needs
Row = Callable[[Span, Columns, Any], Any]  # (queries, columns, carry) -> carry


class Short(NamedTuple):
    """Of rows of so few tokens that a tile of queries has all keys to its own end at once.

    Attributes:
        length: of the row.
    """

    length: int

    def rows(self, row: Row, carry: Any) -> Any:
        """Go through the tiles of queries."""
        for begin in range(0, self.length, BLOCK):
            ours = Span(begin, min(BLOCK, self.length - begin))
            carry = row(ours, _at_once(Span(0, begin + ours.size)), carry)
        return carry


class Long(NamedTuple):
    """Of longer rows: tiles of keys one after the other, where not all that is needed is near.

    Attributes:
        numbers: [tiles, tiles] for each tile of queries those of keys; first those that are needed, in order.
        counts: [tiles] how many these are.
        near: [tiles] whether all that is needed is among the WIDE last keys; None where that makes no difference.
    """

    numbers: Int[Array, "tiles tiles"]
    counts: Int[Array, "tiles"]
    near: Bool[Array, "tiles"] | None

    def rows(self, row: Row, carry: Any) -> Any:
        """Go through the tiles of queries."""

        def tile(index: Array, carry: Any) -> Any:
            ours = _tile(index)

            def loop(step: Step, carry: Any) -> Any:
                one = lambda number, carry: step(_tile(self.numbers[index, number]), carry)  # noqa: E731
                return lax.fori_loop(0, self.counts[index], one, carry)

            if self.near is None:
                return row(ours, loop, carry)
            last = _at_once(Span(jnp.maximum(0, ours.begin + BLOCK - WIDE), WIDE))
            return lax.cond(self.near[index], lambda x: row(ours, last, x), lambda x: row(ours, loop, x), carry)

        return lax.fori_loop(0, len(self.counts), tile, carry)


def tiles_of(views: Views, window: Int[Array, ""] | None) -> Short | Long:
    """Those of rows of a length that is `padded`."""
    length, is_cpu = views.positions.shape[1], platform() == "cpu"
    if length <= (WIDE if is_cpu else BLOCK):
        return Short(length)
    needed = jnp.any(needed_tiles(views, window, BLOCK), axis=0)  # by any row
    numbers = jnp.argsort(~needed, axis=1, stable=True)
    near = numbers[:, 0] * BLOCK + WIDE >= (jnp.arange(len(numbers)) + 1) * BLOCK if is_cpu else None
    return Long(numbers, jnp.sum(needed, axis=1), near)


def padded(length: int) -> int:
    """The length that rows of so many tokens are brought to."""
    if length > BLOCK:
        return length + -length % BLOCK
    return length + -length % STEP if platform() == "cpu" else length


def _at_once(keys: Span) -> Columns:
    return lambda step, carry: step(keys, carry)


def _tile(index: Int[Array, ""]) -> Span:
    return Span(index * BLOCK, BLOCK)
