"""Locks on files and folders that end with the process that holds them."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxpost.errors import ConfigError, JaxpostError

LOCK = ".lock"


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file or folder, which ends with the process at the latest; False if another one holds it.

    A file system without locks never gives one.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(handle)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder, which is made where it is missing; a killed run's lock is gone with it.

    A run that is refused before it has written anything leaves no folder that was not there.

    The lock is the kernel's; the file says who has it. Where the file system has no locks, nobody is kept out.

    Raises:
        ConfigError: another run is at work there, or the folder cannot be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be written ({error.strerror}); choose another") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
            raise ConfigError(
                f"{folder} belongs to a run that is at work ({owner}); wait for it, or give another --output_dir"
            ) from None
        except OSError:
            pass  # no locks here
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        try:
            yield
        except JaxpostError:
            if made and [path.name for path in folder.iterdir()] == [LOCK]:  # refused before anything was written
                (folder / LOCK).unlink()
                folder.rmdir()
            raise
    finally:
        os.close(handle)
