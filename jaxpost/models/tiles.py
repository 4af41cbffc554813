"""The tiles of scores that the plain attention goes through, a tile of queries after the other.

On CPU a tile of queries of a short row has all its keys at once. Each query's weights are then one sum, as they are
where a token is decoded: both give the same to the bit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from jaxpost.models.softmax import total
from jaxpost.models.views import Views, needed_tiles
from jaxpost.platform import platform

BLOCK = 128  # tokens of a tile
WIDE = 256  # tokens of rows on CPU up to which a tile has all keys at once
ALONE = 512  # the same of a row that is alone; more keys XLA sums in two parts
STEP = 64  # of the lengths of short rows there: a product of fewer than 48 columns is summed in another order


class Span(NamedTuple):
    """Tokens that follow each other in a row."""

    begin: Int[Array, ""] | int
    size: int


Column = Callable[[Span, Any], Any]  # (keys, carry) -> carry
Columns = Callable[[Column, Any], Any]  # goes through the keys that a tile of queries needs
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

    def total(self, weights: Array) -> Array:
        """The sum of a tile's weights over its keys, as it is where a token is decoded."""
        return total(weights)


class Long(NamedTuple):
    """Of longer rows: tiles of keys one after the other; those that are not needed are skipped at run time.

    Attributes:
        numbers: [tiles, tiles] for each tile of queries those of keys; first those that are needed, in order.
        counts: [tiles] how many these are.
    """

    numbers: Int[Array, "tiles tiles"]
    counts: Int[Array, "tiles"]

    def rows(self, row: Row, carry: Any) -> Any:
        """Go through the tiles of queries."""

        def tile(index: Array, carry: Any) -> Any:
            def loop(column: Column, carry: Any) -> Any:
                one = lambda number, carry: column(_tile(self.numbers[index, number]), carry)  # noqa: E731
                return lax.fori_loop(0, self.counts[index], one, carry)

            return row(_tile(index), loop, carry)

        return lax.fori_loop(0, len(self.counts), tile, carry)

    def total(self, weights: Array) -> Array:
        """The sum of a tile's weights over its keys; those of all tiles are added up in another order anyway."""
        return jnp.sum(weights, axis=-1, keepdims=True)


def tiles_of(views: Views, window: Int[Array, ""] | None) -> Short | Long:
    """Those of rows of a length that is `padded`."""
    rows, length = views.positions.shape
    if length <= (BLOCK if platform() != "cpu" else WIDE if rows > 1 else ALONE):
        return Short(length)
    needed = jnp.any(needed_tiles(views, window, BLOCK), axis=0)  # by any row
    return Long(jnp.argsort(~needed, axis=1, stable=True), jnp.sum(needed, axis=1))


def padded(length: int) -> int:
    """The length that rows of so many tokens are brought to."""
    if length > BLOCK:
        return length + -length % BLOCK
    return length + -length % STEP if platform() == "cpu" else length


def _at_once(keys: Span) -> Columns:
    return lambda column, carry: column(keys, carry)


def _tile(index: Int[Array, ""]) -> Span:
    return Span(index * BLOCK, BLOCK)
