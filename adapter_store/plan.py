"""What the local store holds in vain: first a plan, to be looked at, then exactly that is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapter_store.atomic import STALE_S
from adapter_store.local import LocalStore


@dataclass(frozen=True)
class Garbage:
    """One file that nothing refers to: where, how large in bytes, and what it is."""

    path: Path
    bytes: int
    what: str


@dataclass(frozen=True)
class GcPlan:
    """Files that nothing refers to, sorted by path."""

    store: LocalStore
    garbage: tuple[Garbage, ...]

    def execute(self) -> list[Garbage]:
        """Delete them, but for what a version has come to refer to since; what was deleted.

        Raises:
            IntegrityError: a version is damaged.
            StoreError: the lock is held, or the system refuses.
        """
        with self.store.held():
            needed = self.store.needed()
            deleted = [each for each in self.garbage if each.path not in needed and each.path.exists()]
            for each in deleted:
                each.path.unlink()
        return deleted


def plan_gc(store: LocalStore) -> GcPlan:
    """Everything that no version of any adapter reaches: tags, aliases and lineage all end at versions.

    Raises:
        IntegrityError: a version is damaged, so that what it refers to is not known.
        StoreError: the lock is held, or the system refuses.
    """
    if not store.root.is_dir():
        return GcPlan(store, ())
    with store.held():  # a commit that is under way has files that no version refers to yet
        needed = store.needed()
        found = [Garbage(path, path.stat().st_size, what) for path, what in _candidates(store) if path not in needed]
    return GcPlan(store, tuple(sorted(found, key=lambda each: each.path)))


def _candidates(store: LocalStore) -> Iterator[tuple[Path, str]]:
    layout = store.layout
    for folder, what in ((layout.blobs, "content of no version"), (layout.tmp, "left by a killed process")):
        for path in folder.iterdir() if folder.is_dir() else ():
            if folder != layout.tmp or time.time() - path.stat().st_mtime > STALE_S:
                yield path, what
    for name in store.names():
        for path in layout.adapter(name).glob("left/v*"):
            yield path, "record of a pull that was killed"
