"""What leaves the local store: what it holds in vain, first as a plan to be looked at, and an adapter that is deleted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapter_store.atomic import disk_errors, sync_folder
from adapter_store.local import LocalStore
from cpserve.errors import StoreError


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
    with disk_errors():
        if not store.root.is_dir():
            return GcPlan(store, ())
    with store.held():  # a commit that is under way has files that no version refers to yet
        needed = store.needed()
        found = [Garbage(path, path.stat().st_size, what) for path, what in _candidates(store) if path not in needed]
    return GcPlan(store, tuple(sorted(found, key=lambda each: each.path)))


def delete(store: LocalStore, name: str) -> tuple[int, int]:
    """Delete an adapter and what no other one refers to; how many versions and bytes those were.

    Contents go first and their names last, so that after a kill it is there to be deleted again.

    Raises:
        IntegrityError: another adapter is damaged; nothing was deleted.
        StoreError: the adapter's folder is a link, or the system refuses.
    """
    layout, folder, freed = store.layout, store.layout.adapter(name), 0
    if folder.is_symlink():
        raise StoreError(f"{folder} is a link", hint="delete it and what it leads to yourself")
    with store.held():
        head, needed = store.head(name), store.needed(without=name)
        for path in (each for place in (layout.blobs, layout.tmp) if place.is_dir() for each in place.iterdir()):
            if path not in needed:
                freed += path.stat().st_size
                path.unlink()
        shutil.rmtree(folder)
        sync_folder(folder.parent)
    return head, freed


def _candidates(store: LocalStore) -> Iterator[tuple[Path, str]]:
    layout = store.layout
    for folder, what in ((layout.blobs, "content of no version"), (layout.tmp, "left by a killed process")):
        for path in folder.iterdir() if folder.is_dir() else ():
            yield path, what
    for name in store.names():
        for path in layout.adapter(name).glob("left/v*"):
            yield path, "record of a pull that was killed"
