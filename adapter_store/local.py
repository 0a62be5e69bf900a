"""The store on this machine's disk: immutable versions over content-addressed blobs.

Knows numbers, not references (`store.py`). A version exists once the small file `vN` with its manifest's hash does;
that file is made last and never overwritten, so a process killed at any moment leaves the old head or the new one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from adapter_store.atomic import disk_errors, locked, make_folder, staged, sweep, sync_folder
from adapter_store.layout import MANIFEST, LocalLayout, check_paths
from adapter_store.ref import check_alias
from adapter_store.version import Version, damaged, parse, sha256
from cpserve.errors import RefError, StoreError
from cpserve.manifest import NAME_PATTERN, FileEntry, Manifest, Parent

_VERSION_FILE = re.compile(r"v([1-9][0-9]{0,8})")


class LocalStore:
    """Versions under one root folder; constructing it touches no disk."""

    def __init__(self, root: Path) -> None:
        self._at = LocalLayout(root)

    def names(self) -> list[str]:
        """Names with at least one version, sorted."""
        return [name for name in _listed(self._at.adapters) if self.head(name)]

    def head(self, name: str) -> int:
        """The newest version's number, 0 where there is none."""
        matches = map(_VERSION_FILE.fullmatch, _listed(self._at.adapter(name)))
        return max((int(match[1]) for match in matches if match), default=0)

    def version(self, name: str, number: int) -> Version:
        """Read a version's manifest.

        Raises:
            IntegrityError: its record is missing or damaged.
        """
        pointer = self._at.version(name, number)
        try:
            pin = pointer.read_text("ascii")
            document = self._at.blob(pin.removesuffix("\n")).read_bytes()
        except (OSError, ValueError) as error:
            raise damaged(f"{name}@v{number}", MANIFEST, "is missing or cannot be found by its hash") from error
        if pin != f"{sha256(document)}\n":
            raise damaged(f"{name}@v{number}", MANIFEST, "is damaged")
        return Version(parse(name, number, document), document, lambda entry: self._at.blob(entry.sha256).read_bytes())

    def chain(self, name: str) -> Iterator[Version]:
        """All versions, newest first, each checked to be the one that its successor follows.

        Raises:
            IntegrityError: one is missing, damaged or does not fit.
        """
        expected: Parent | None = None
        for number in range(self.head(name), 0, -1):
            version = self.version(name, number)
            if expected and version.pin != expected:
                raise damaged(str(version), MANIFEST, f"is not the one that v{number + 1} follows")
            check_previous(version)
            expected = version.manifest.previous
            yield version

    def commit(self, name: str, files: Mapping[str, bytes], draft: Manifest, *, expected_head: int | None) -> Version:
        """Store a new version after the head; `expected_head` None follows whatever the head is.

        Raises:
            RefError: the name cannot be one.
            StoreError: the head is another, a path is refused, the lock is held or the disk is full; nothing is stored.
        """
        check_paths(files)
        entries = tuple(
            FileEntry(path=path, size=len(files[path]), sha256=sha256(files[path])) for path in sorted(files)
        )
        with self._writing(name):
            head = self.head(name)
            if expected_head not in {None, head}:
                raise StoreError(
                    f"{name} has moved on: its head is v{head}, not v{expected_head}",
                    hint=f"learn again from v{head}, or give the new sequence another name with --adapter NAME",
                )
            return self._append(name, head, entries, draft, files)

    def repeat(self, version: Version) -> Version:
        """Store a new version of the same name with the content of an older one; no blob but its manifest's is written.

        Raises:
            IntegrityError: a file of the older version is damaged.
            StoreError: the lock is held or the disk is full; nothing is stored.
        """
        for path in version.paths():
            version.read(path)
        name = version.manifest.name
        with self._writing(name):
            return self._append(name, self.head(name), version.manifest.files, version.manifest, {})

    def alias_names(self, name: str) -> list[str]:
        """The aliases of one adapter, sorted."""
        return _listed(self._at.aliases(name))

    def alias(self, name: str, alias: str) -> int:
        """The number of the version that one of `alias_names` stands for.

        Raises:
            IntegrityError: its file is damaged.
        """
        text = (self._at.aliases(name) / alias).read_bytes().decode("ascii", "replace")
        match = _VERSION_FILE.fullmatch(text.removesuffix("\n"))
        if not match or not self._at.version(name, int(match[1])).is_file():
            raise damaged(f"{name}@{alias}", f"aliases/{alias}", "names no version")
        return int(match[1])

    def set_alias(self, name: str, alias: str, number: int) -> None:
        """Make an alias stand for a version, whatever it stood for before.

        Raises:
            RefError: the alias is reserved or malformed, or there is no such version.
            StoreError: the lock is held or the disk is full.
        """
        target = self._at.aliases(name) / check_alias(alias)
        if not self._at.version(name, number).is_file():
            raise RefError(
                f"there is no {name}@v{number}", ref=f"{name}@v{number}", hint=f"see: cpserve adapters log {name}"
            )
        with self._writing(name):
            make_folder(target.parent)
            with staged(self._at.tmp, f"v{number}\n".encode()) as temporary:
                temporary.replace(target)
            sync_folder(target.parent)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        adapter = self._at.adapter(name)
        with disk_errors():
            make_folder(self._at.tmp)
            with locked(self._at.lock):
                sweep(self._at.tmp)
                make_folder(self._at.blobs)
                make_folder(adapter)
                yield

    def _append(
        self, name: str, head: int, entries: tuple[FileEntry, ...], draft: Manifest, files: Mapping[str, bytes]
    ) -> Version:
        manifest = _completed(draft, name, entries, self.version(name, head).pin if head else None)
        document = manifest.dump()
        pointer = self._at.version(name, manifest.version)
        fresh: list[Path] = []
        try:
            for data in (*files.values(), document):
                self._keep(data, fresh)
            # Contents first, their names next, and only then the one file that refers to them.
            sync_folder(self._at.blobs)
            with staged(self._at.tmp, f"{sha256(document)}\n".encode()) as temporary:
                os.link(temporary, pointer)  # unlike a rename, a link never overwrites
            sync_folder(pointer.parent)
        except BaseException:
            if not pointer.exists():  # nothing refers to them, and a full disk wants the space back
                for blob in fresh:
                    blob.unlink(missing_ok=True)
            raise
        return self.version(name, manifest.version)

    def _keep(self, data: bytes, fresh: list[Path]) -> None:
        """Store a blob, unless it is there and whole; one that is not whole is mended."""
        blob = self._at.blob(sha256(data))
        known = blob.is_file()
        if known and blob.read_bytes() == data:
            return
        with staged(self._at.tmp, data) as temporary:
            temporary.replace(blob)
        if not known:
            fresh.append(blob)


def check_previous(version: Version) -> None:
    """Check that a version follows the one numbered before it, and the first one none.

    Raises:
        IntegrityError: it does not.
    """
    previous = version.manifest.previous
    if (previous.version if previous else 0) != version.manifest.version - 1:
        raise damaged(str(version), MANIFEST, "does not follow the version before it")


def _completed(draft: Manifest, name: str, entries: tuple[FileEntry, ...], previous: Parent | None) -> Manifest:
    number = previous.version + 1 if previous else 1
    concepts = tuple(
        concept if concept.since else concept.model_copy(update={"since": number}) for concept in draft.concepts
    )
    return draft.model_copy(
        update={
            "name": name,
            "version": number,
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "previous": previous,
            "files": entries,
            "concepts": concepts,
        }
    )


def _listed(folder: Path) -> list[str]:
    """Names in a folder, sorted; what desktops leave there is none of ours."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(name for name in names if re.fullmatch(NAME_PATTERN, name))
