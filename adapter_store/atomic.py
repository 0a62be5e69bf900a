"""Writing so that every reader, and whoever comes after a killed process, finds the old state or the new one.

Knows files, locks and what the operating system refuses. Does not know what is stored.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpserve.errors import StoreError

LOCK_TIMEOUT_S = 60.0

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def disk_errors(instead: str = "choose another folder with CPSERVE_HOME") -> Iterator[None]:
    """Turn what the operating system refuses into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StoreError(
                "the disk is full; nothing has changed", hint="free some space, then run the same command again"
            ) from error
        raise StoreError(f"cannot read or write: {error}", hint=f"check the permissions, or {instead}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes and threads out; a killed holder's lock is released by the operating system.

    Raises:
        StoreError: another process holds it for more than `LOCK_TIMEOUT_S`.
    """
    from filelock import FileLock, Timeout  # who only reads needs none

    lock = FileLock(path, timeout=LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except Timeout as error:
        raise StoreError(
            f"another process has held {path} for {LOCK_TIMEOUT_S:.0f} s", hint="wait for it to end, or end it"
        ) from error
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether some process holds the lock right now, or nobody can tell."""
    from filelock import FileLock

    try:
        if not path.exists():
            return False
        with FileLock(path, blocking=False):
            return False
    except OSError:  # held, or a disk that only can be read
        return True


@contextmanager
def staged(folder: Path, data: bytes) -> Iterator[Path]:
    """A temporary file in `folder` with the data safely on disk, to be renamed; what is left goes away.

    Its name is a hidden one: what a kill leaves in a folder of the user's is no picture to learn from or to recognise.
    """
    temporary = folder / f".{os.urandom(16).hex()}"
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files of processes that were killed; whoever writes holds the lock that the caller holds."""
    for path in folder.iterdir():
        path.unlink()


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each safely on disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Put the names in a folder safely on disk."""
    if sys.platform == "win32":  # folders cannot be opened there, and NTFS journals their names
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
