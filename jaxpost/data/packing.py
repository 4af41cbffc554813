"""Packing: which pieces of which examples share a row.

Best-fit decreasing places the longest pieces first, each in the fullest row that still has room (Ding et al., 2024,
"Fewer Truncations Improve Language Modeling", arXiv:2404.10830). It looks at the whole dataset, so rows fill better
than with a packer that sees a block of rows at a time.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxpost.data.examples import Example, common_prefix
from jaxpost.data.fingerprint import digest
from jaxpost.data.store import Store
from jaxpost.options import Group, check_choices, one_of, option

STRATEGIES = ("bfd", "bfd_split", "wrapped")
MAX_SEARCHED = 64  # packs among which one with another prompt is looked for


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """Whether rows share a row of max_length tokens; TRL's names and defaults."""

    help_group = Group.BATCH

    packing: bool = option(False, "Fill rows of max_length tokens with several examples, which never see each other.")
    packing_strategy: str = option(
        "bfd", "bfd (cuts long examples), bfd_split (splits them) or wrapped (cuts anywhere).", choices=STRATEGIES
    )
    eval_packing: bool | None = option(None, "The same for evaluation; by default as packing.", may_change=True)

    def __post_init__(self) -> None:
        check_choices(self)

    def packs(self, training: bool) -> bool:
        """Whether rows are packed, of the training set or of the held-out one."""
        return self.packing if training or self.eval_packing is None else self.eval_packing


class Piece(NamedTuple):
    """Tokens `start` to `stop` of an example."""

    example: int
    start: int
    stop: int


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, strategy: str = "bfd") -> list[list[Piece]]:
    """Distribute examples over rows of at most `capacity` tokens; names and results are TRL's, over a whole dataset.

    Args:
        lengths: tokens of each example; examples without any are left out.
        capacity: tokens of a row.
        strategy: `bfd` cuts examples that are longer than a row; `bfd_split` goes on with the rest as a piece of its
            own; `wrapped` fills rows one after the other and cuts wherever one is full.

    Raises:
        ConfigError: unknown strategy.
    """
    one_of("packing_strategy", strategy, STRATEGIES)
    if strategy == "wrapped":
        return _wrap(lengths, capacity)
    if strategy == "bfd":
        pieces = [Piece(i, 0, min(int(length), capacity)) for i, length in enumerate(lengths) if length]
    else:
        pieces = [
            Piece(i, start, min(start + capacity, int(length)))
            for i, length in enumerate(lengths)
            for start in range(0, int(length), capacity)
        ]
    return _best_fit_decreasing(pieces, capacity)


def _best_fit_decreasing(pieces: list[Piece], capacity: int) -> list[list[Piece]]:
    """Ties keep the order of the examples; among rows with the same room the oldest is filled."""
    rows: list[list[Piece]] = []
    by_room: dict[int, deque[list[Piece]]] = {}
    rooms: list[int] = []  # the keys of by_room in ascending order; at most `capacity` of them
    for piece in sorted(pieces, key=lambda piece: piece.start - piece.stop):
        size = piece.stop - piece.start
        place = bisect_left(rooms, size)
        if place == len(rooms):
            row, room = [], capacity
            rows.append(row)
        else:
            room = rooms[place]
            row = by_room[room].popleft()
            if not by_room[room]:
                del by_room[room], rooms[place]
        row.append(piece)
        left = room - size
        if left:
            if left not in by_room:
                by_room[left] = deque()
                insort(rooms, left)
            by_room[left].append(row)
    return rows


def _wrap(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    room = 0
    for i, length in enumerate(lengths):
        start = 0
        while start < length:
            if not room:
                rows.append([])
                room = capacity
            stop = min(int(length), start + room)
            rows[-1].append(Piece(i, start, stop))
            room -= stop - start
            start = stop
    return rows


class Packs(Sequence[tuple[Example, ...]]):
    """Pieces of stored examples that stay together in a row; `packs[i]` reads those of one.

    The first token of a piece that begins inside of an example is no target. What came before is lost, unless the pack
    branches: there it is what the first piece of the pack begins with.

    Args:
        examples: stored.
        pieces: int64 [P, 3], the fields of Piece; those of a pack follow each other.
        ends: int64 [N], where each pack ends among the pieces.
        branches: whether packs branch.
        facts: float32 [len(examples)] each, what batches tell of every example, by column; None where examples do not
            count for themselves.

    Attributes:
        sizes: tokens of each pack, int64 [N].
    """

    def __init__(
        self,
        examples: Store,
        pieces: np.ndarray,
        ends: np.ndarray,
        facts: Mapping[str, np.ndarray] | None = None,
        *,
        branches: bool = False,
    ) -> None:
        self.examples, self.facts, self._pieces, self._ends, self._branches = examples, facts, pieces, ends, branches
        totals = np.cumsum(self._pieces[:, 2] - self._pieces[:, 1])
        self.sizes = np.diff(totals[self._ends - 1], prepend=0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: Any) -> Any:
        return tuple(self._cut(*piece) for piece in self._pieces_of(i))

    def members(self, i: int) -> np.ndarray:
        """Numbers of the examples of a pack."""
        return self._pieces_of(i)[:, 0]

    def partner(self, i: int) -> int:
        """The pack whose completion is put beside the prompt of pack `i`: the nearest before it with another prompt.

        The last pack comes before the first. Each pack is of one example.
        """
        prompt, before = self._prompt(i), ((i - k) % len(self) for k in range(1, MAX_SEARCHED + 1))
        return next((j for j in before if not np.array_equal(self._prompt(j), prompt)), (i - 1) % len(self))

    def mismatched(self, i: int, max_length: int) -> Example:
        """The prompt of pack `i` with the completion of its partner; cut at the end."""
        prompt, j = self._prompt(i), self.partner(i)
        tokens = np.concatenate([prompt, self[j][0].tokens[len(self._prompt(j)) :]])[:max_length]
        return Example(tokens, np.arange(len(tokens)) >= max(len(prompt), 1))

    def mismatched_size(self, i: int, max_length: int) -> int:
        """Tokens of `mismatched`, which is not made for it."""
        j = self.partner(i)
        return min(max_length, len(self._prompt(i)) + int(self.sizes[j]) - len(self._prompt(j)))

    def _pieces_of(self, i: int) -> np.ndarray:
        return self._pieces[self._ends[i - 1] if i else 0 : self._ends[i]]

    def _prompt(self, i: int) -> np.ndarray:
        """Tokens of the prompt of a pack of one example."""
        number = self.members(i)[0]
        return self.examples[number].tokens[: self.examples.starts[number]]

    def digest(self) -> str:
        """Of every token and mask and of how they are dealt, in 32 hexadecimal digits."""
        return digest(self.examples.digest, self._pieces.tobytes(), self._ends.tobytes())

    def efficiency(self, capacity: int) -> float:
        """Share of rows of so many tokens that is not padding."""
        return float(self.sizes.sum()) / max(1, len(self) * capacity)

    def _cut(self, example: int, start: int, stop: int) -> Example:
        whole = self.examples[example]
        tokens, mask = whole.tokens[start:stop], whole.loss_mask[start:stop]
        if start:
            mask = mask.copy()
            mask[0] = False
        return Example(tokens, mask, whole.value, start if self._branches else 0)


def first_tokens(examples: Iterable[Example], count: int) -> Iterator[Example]:
    """The first examples, until there are `count` tokens."""
    for example in examples:
        yield example
        count -= len(example.tokens)
        if count <= 0:
            return


def units(examples: Store, size: int, facts: Mapping[str, np.ndarray] | None, *, branches: bool = False) -> Packs:
    """So many examples at a time, each of which counts for itself: with 2, the pairs of a store that holds pairs.

    Args:
        examples: stored.
        size: examples of a unit.
        facts: those of Packs.
        branches: a unit has once what its examples begin with alike.
    """
    numbers = np.arange(len(examples))
    starts = _branch_starts(examples, size) if branches else 0 * numbers
    pieces = np.stack([numbers, starts, examples.lengths], axis=1)
    return Packs(examples, pieces, numbers[size - 1 :: size] + 1, facts, branches=branches)


def _branch_starts(examples: Store, size: int) -> np.ndarray:
    """Where each example leaves the first one of its unit, int64 [N]; 0 for these themselves.

    A branch begins with the token before the first that differs or is a target in either, to predict that one from.
    """
    starts = np.zeros(len(examples), np.int64)
    for first in range(0, len(examples), size):
        trunk = examples[first].tokens
        for branch in range(first + 1, first + size):
            limit = min(examples.starts[first], examples.starts[branch])
            starts[branch] = max(0, common_prefix(trunk[:limit], examples[branch].tokens[:limit]) - 1)
    return starts


def singles(examples: Store) -> Packs:
    """Each example for itself."""
    return units(examples, 1, None)


def pack_examples(examples: Store, max_length: int, strategy: str) -> Packs:
    """Packs of examples that fill rows of `max_length` tokens; those without any target are left out."""
    packed = pack(examples.lengths, max_length, strategy)
    rows = [row for row in packed if any(_has_target(examples, piece) for piece in row)]
    pieces = np.array([piece for row in rows for piece in row], np.int64).reshape(-1, 3)
    return Packs(examples, pieces, np.cumsum([len(row) for row in rows], dtype=np.int64))


def _has_target(examples: Store, piece: Piece) -> bool:
    return bool(examples[piece.example].loss_mask[piece.start + (piece.start > 0) : piece.stop].any())
