"""What is not taken in from strangers, decided before a single file is fetched: by the manifest, and by what the Hub has."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from adapter_store.version import damaged
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


def check_announced(ref: str, entries: Iterable[FileEntry], there: Mapping[str, tuple[int, str | None]]) -> None:
    """Accept files of which the Hub itself says that they are what the manifest promises; `there` is what it says, by path.

    Raises:
        IntegrityError: one is missing, or of another size or hash.
    """
    for entry in entries:
        size, digest = there.get(entry.path, (None, None))
        if size != entry.size or digest not in {None, entry.sha256}:
            raise damaged(ref, entry.path, "is missing or is not what the manifest promises")
