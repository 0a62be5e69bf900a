"""What is too much to take in from strangers, decided by the manifest before a single file is fetched."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from cpserve.errors import StoreError
from cpserve.manifest import FileEntry

FILES = 10_000
BYTES = 8 << 30


def check_limits(ref: str, entries: Iterable[FileEntry], root: Path) -> None:
    """Accept files that are few and small enough, and fit on the disk below `root`.

    Raises:
        StoreError: they do not.
    """
    sizes = [entry.size for entry in entries]
    if len(sizes) > FILES or sum(sizes) > BYTES:
        raise StoreError(
            f"{ref} has {len(sizes):,} files of {sum(sizes):,} bytes; more than {FILES:,} or {BYTES:,} are not fetched",
            hint="check that this is the adapter that you mean",
        )
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if sum(sizes) > free:
        raise StoreError(
            f"{ref} needs {sum(sizes):,} bytes, and {free:,} are free",
            hint="free some space, then run the same command again",
        )
