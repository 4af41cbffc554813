"""How weights move through the host's memory: in tiles that fit the cache, and without needless copies."""

import math
import mmap
from collections.abc import Sequence

import numpy as np

TILE, PADDING = (64, 512), 32  # elements
ALIGNMENT = 64  # bytes; what XLA asks of memory that a CPU device is to use in place


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that a CPU device can hold without copying it; its contents are arbitrary."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copy and cast a vector or a matrix into another of the same shape, either of them possibly transposed.

    Transposing goes tile by tile through memory whose rows do not compete for the same lines of the cache, as those of
    a matrix with a power of two of columns do; that is ten times as fast as all at once.
    """
    if source.strides[0] < source.strides[-1]:
        source, target = source.T, target.T
    if source.dtype == target.dtype:  # numpy copies its own types faster than bfloat16
        bits = np.dtype(f"u{source.dtype.itemsize}")
        source, target = source.view(bits), target.view(bits)
    if target.strides[0] >= target.strides[-1]:
        target[...] = source
        return
    num_rows, num_columns = TILE
    padded = np.empty((num_rows, num_columns + PADDING), target.dtype)
    for row in range(0, source.shape[0], num_rows):
        for column in range(0, source.shape[1], num_columns):
            at = slice(row, row + num_rows), slice(column, column + num_columns)
            tile = padded[: source[at].shape[0], : source[at].shape[1]]
            tile[...] = source[at]
            target[at] = tile


def release(array: np.ndarray) -> None:
    """Give back the pages of a contiguous view into a mapped file, which count as this process's memory until then.

    They are read again if they are needed again. Nothing happens to an array that is not of a file.
    """
    owner = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap):
        begin = array.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
        page = begin - begin % mmap.PAGESIZE
        owner.madvise(mmap.MADV_DONTNEED, page, begin - page + array.nbytes)
