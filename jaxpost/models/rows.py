"""The table between our parameters and HF's tensors, read forwards to load and backwards to export."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """Rows `start` to `stop` of an HF tensor that fuses several of ours along its first (output) dimension."""

    start: int
    stop: int


class Row(NamedTuple):
    """Where one of our parameters lives in HF's files.

    Attributes:
        path: ours, e.g. `layers.mlp.up.kernel`.
        hf_name: HF's; each `{}` stands for one leading axis of ours: the layer, then the expert.
        transpose: HF stores the matrix as [out, in].
        part: what of the HF tensor is ours, before it is transposed; None for all of it.
    """

    path: str
    hf_name: str
    transpose: bool = False
    part: Part | None = None

    @property
    def stacked(self) -> int:
        """Leading axes of ours that HF spreads over tensors."""
        return self.hf_name.count("{}")


class Piece(NamedTuple):
    """A slice of one of our parameters: `parameter[at]`, transposed if the row says so."""

    row: Row
    at: tuple[int, ...]


class HFTensor(NamedTuple):
    """A tensor of HF's, as the pieces that follow each other along its first dimension.

    Attributes:
        shape: in HF's layout.
        pieces: one, or several where HF fuses.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def hf_tensors(rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, HFTensor]:
    """Every HF tensor of a model, by name.

    Args:
        rows: of the model's family.
        shapes: of our parameters, by path.
    """
    left, tensors = dict(shapes), {}
    for row in rows:
        shape = left.pop(row.path)
        inner = shape[row.stacked :]
        inner = inner[::-1] if row.transpose else inner
        for at in itertools.product(*map(range, shape[: row.stacked])):
            name = row.hf_name.format(*at)
            before = tensors.get(name, HFTensor((0, *inner[1:]), ()))
            total = before.shape[0] + inner[0]
            assert row.part in (None, (before.shape[0], total)), f"{row}: pieces out of order"
            tensors[name] = HFTensor((total, *inner[1:]), (*before.pieces, Piece(row, at)))
    assert not left, f"parameters without a row: {sorted(left)}"
    return tensors
