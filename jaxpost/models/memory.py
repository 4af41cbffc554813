"""How weights move through the host's memory: in blocks that fit the cache, without a copy more than it takes."""

import math
import mmap
from collections.abc import Sequence

import numpy as np

BLOCK_ROWS = 16
ALIGNMENT = 64  # bytes; what XLA asks of memory that a CPU device is to use in place


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that a CPU device can hold without copying it; its contents are arbitrary."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copy and cast a vector or a matrix into another one of the same shape, either of them possibly transposed.

    A few of the source's rows at a time: where a transposition spreads them over many lines of the cache, these are
    still there for the next of the few, which is several times as fast as row after row.
    """
    if source.strides[0] < source.strides[-1]:
        source, target = source.T, target.T
    if source.dtype == target.dtype:  # numpy copies its own types faster than bfloat16
        bits = np.dtype(f"u{source.dtype.itemsize}")
        source, target = source.view(bits), target.view(bits)
    for start in range(0, len(source), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        target[rows] = source[rows].astype(target.dtype, copy=False)


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
