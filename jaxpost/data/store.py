"""Tokenised examples in a file: written as they come and mapped into memory, which does not grow with their number.

With a key the file is an entry of a cache. It appears as a whole or not at all: a killed writer leaves none, and of two
writers either may win, since both write the same. Without a key it is a temporary file, which ends with the process.
"""

import hashlib
import json
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxpost.data.examples import Example
from jaxpost.errors import CheckpointError, one_line
from jaxpost.locks import locked
from jaxpost.options import Group, option

BATCH = 1000  # examples that are written at a time
COLUMNS = ("tokens", "loss_mask", "value")  # of an Example
SUFFIX, UNFINISHED = ".arrow", ".writing"
KEPT_SECONDS = 30 * 24 * 3600  # since an entry was last used
ABANDONED_SECONDS = 3600  # since an unfinished file was last written to

_log = logging.getLogger("jaxpost")


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Where tokenised rows are kept."""

    help_group = Group.DATA

    tokenized_cache_dir: str = option(
        "~/.cache/jaxpost/tokenized",
        "Folder that keeps tokenised rows for the next run; empty for none.",
        may_change=True,
    )


class Store(Sequence[Example]):
    """Examples in a mapped Arrow file; `examples[i]` is a view of it.

    Attributes:
        lengths: tokens of each example, int64 [N].
        values: of each example, float32 [N].
        facts: what was noted beside them.
        digest: of all tokens, masks and values, in 32 hexadecimal digits.
    """

    def __init__(self, file: IO[bytes]) -> None:
        """Map an open file.

        Raises:
            ValueError: it is damaged, or it is not such a file (pyarrow's errors are ValueErrors too).
        """
        import pyarrow as pa

        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches - 1)]
        metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)[1] or {}
        noted = json.loads(metadata[b"noted"])
        self.facts, self.digest = noted["facts"], noted["digest"]
        columns = [[batch.column(name) for name in COLUMNS] for batch in batches]
        self._offsets = [tokens.offsets.to_numpy() for tokens, *_ in columns]
        self._parts = [(tokens.values.to_numpy(), masks.values.to_numpy().view(bool)) for tokens, masks, _ in columns]
        self.values = np.concatenate([np.array([], np.float32), *(values.to_numpy() for *_, values in columns)])
        self.lengths = np.concatenate([np.array([], np.int64), *(np.diff(offsets) for offsets in self._offsets)])
        self._firsts = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        batch = int(np.searchsorted(self._firsts, i, side="right")) - 1
        start, stop = self._offsets[batch][i - self._firsts[batch] :][:2]
        tokens, masks = self._parts[batch]
        return Example(tokens[start:stop], masks[start:stop], float(self.values[i]))

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of the first token that is a target in each example, int64 [N]; the example's length where none is."""
        found = [np.array([], np.int64)]
        for offsets, (_, masks) in zip(self._offsets, self._parts, strict=True):
            targets = np.append(np.flatnonzero(masks), len(masks))
            firsts = targets[np.searchsorted(targets, offsets[:-1])]
            found.append(np.minimum(firsts, offsets[1:]) - offsets[:-1])
        return np.concatenate(found)

    def is_whole(self) -> bool:
        """Whether every token and mask is the one that was written; reads them all."""
        found = _Digest()
        firsts = zip(self._firsts[:-1], self._firsts[1:], strict=True)
        for offsets, (tokens, masks), (first, last) in zip(self._offsets, self._parts, firsts, strict=True):
            found.add(offsets, tokens, masks, self.values[first:last])
        return found.hexdigest() == self.digest


def stored(
    examples: Iterable[Example],
    facts: Callable[[], dict[str, Any]] = dict,
    *,
    folder: str = "",
    key: str | None = None,
) -> Store:
    """Examples on disk. Where the folder has them under that key already, none is asked for.

    Args:
        examples: to write.
        facts: small JSON values to note beside them; called after the last example.
        folder: of the cache; empty for none.
        key: digest of all that the examples depend on; None where that is not known.

    Raises:
        CheckpointError: the file cannot be written.
    """
    if (found := kept(folder, key)) is not None:
        return found
    home = Path(folder).expanduser() if folder else None
    entry = home / f"{key}{SUFFIX}" if home and key else None
    try:
        if home is not None:
            home.mkdir(parents=True, exist_ok=True)
            _sweep(home)
        with _appearing(entry) if entry else tempfile.TemporaryFile(dir=home) as file:
            _write(file, examples, facts)
            file.flush()
            return Store(file)
    except OSError as error:
        place = f"{home or tempfile.gettempdir()}: tokenised rows cannot be written ({one_line(error)})"
        raise CheckpointError(f"{place}; make room or give another --tokenized_cache_dir") from error


def kept(folder: str, key: str | None) -> Store | None:
    """What the folder has under a key; None where that is nothing, or damaged. Arguments as of `stored`."""
    return _read(Path(folder).expanduser() / f"{key}{SUFFIX}") if folder and key else None


class _Digest:
    """The digest of a store, from its batches."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.hexdigest = self._hash.hexdigest

    def add(self, *parts: np.ndarray) -> None:
        """Offsets, tokens, masks and values of a batch."""
        for part in parts:
            self._hash.update(np.ascontiguousarray(part).data)


def _write(file: IO[bytes], examples: Iterable[Example], facts: Callable[[], dict[str, Any]]) -> None:
    import pyarrow as pa

    kinds = pa.list_(pa.int32()), pa.list_(pa.uint8()), pa.float32()
    schema = pa.schema(zip(COLUMNS, kinds, strict=True))
    source, found = iter(examples), _Digest()
    with pa.ipc.new_file(file, schema) as writer:
        while part := list(islice(source, BATCH)):
            offsets = np.cumsum([0, *(len(example.tokens) for example in part)]).astype(np.int32)
            tokens = np.concatenate([example.tokens for example in part]).astype(np.int32)
            masks = np.concatenate([example.loss_mask for example in part]).astype(bool)
            values = np.array([example.value for example in part], np.float32)
            found.add(offsets, tokens, masks, values)
            lists = [pa.ListArray.from_arrays(offsets, flat) for flat in (tokens, masks.view(np.uint8))]
            writer.write_batch(pa.record_batch([*lists, values], schema=schema))
        noted = {"facts": facts(), "digest": found.hexdigest()}
        writer.write_batch(pa.record_batch([[]] * len(kinds), schema=schema), {"noted": json.dumps(noted)})


def _read(entry: Path) -> Store | None:
    """The entry, None where there is none; a damaged one counts as none."""
    try:
        with entry.open("rb") as file:
            found = Store(file)
        os.utime(entry)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        _log.warning("%s cannot be read (%s); the rows are tokenised again", entry, one_line(error))
        return None
    if not found.is_whole():
        _log.warning("%s is damaged; the rows are tokenised again", entry)
        return None
    return found


@contextmanager
def _appearing(entry: Path) -> Iterator[IO[bytes]]:
    """A new file that gets the entry's name at the end, or is gone if anything fails."""
    with tempfile.NamedTemporaryFile(dir=entry.parent, suffix=UNFINISHED, delete=False) as file:
        try:
            with locked(Path(file.name)):
                yield file
                os.fsync(file.fileno())
                os.replace(file.name, entry)
        finally:
            Path(file.name).unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove entries that nobody has used for long, and what killed writers left."""
    now = time.time()
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process sweeps too
            age = now - path.stat().st_mtime
            if path.suffix == SUFFIX and age > KEPT_SECONDS:
                path.unlink()
            elif path.suffix == UNFINISHED and age > ABANDONED_SECONDS:
                with locked(path, wait=False) as abandoned:
                    if abandoned:
                        path.unlink()
