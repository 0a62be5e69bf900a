"""The store on this machine's disk: immutable versions over content-addressed blobs.

Knows numbers, not references (`store.py`). A version exists once the small file `vN` with its manifest's hash does;
that file is made last and never overwritten, so a process killed at any moment leaves the old head or the new one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from adapter_store.atomic import disk_errors, is_held, locked, make_folder, staged, sweep, sync_folder
from adapter_store.layout import MANIFEST, LocalLayout, check_paths, is_training_only
from adapter_store.partial import Left
from adapter_store.ref import VERSION
from adapter_store.version import Version, check_previous, completed, damaged, entries_of, parse, sha256
from cpserve.errors import IntegrityError, StoreError
from cpserve.manifest import NAME_PATTERN, FileEntry, Manifest, Parent


class LocalStore:
    """Versions under one root folder; constructing it touches no disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layout = LocalLayout(root)

    def names(self) -> list[str]:
        """Names with at least one version, sorted."""
        return [name for name in listed(self.layout.adapters) if self.head(name)]

    def unfinished(self) -> list[str]:
        """Names of adapters of which a training was stopped, sorted."""
        return [name for name in listed(self.layout.runs) if not is_held(self.layout.run_lock(name))]

    def head(self, name: str) -> int:
        """The newest version's number, 0 where there is none."""
        matches = map(VERSION.fullmatch, _names_in(self.layout.adapter(name)))
        return max((int(match[1]) for match in matches if match), default=0)

    def version(self, name: str, number: int) -> Version:
        """Read a version's manifest.

        Raises:
            IntegrityError: its record is missing or damaged.
        """
        pin = self.pinned(name, number)
        try:
            document = self.layout.blob(pin).read_bytes()
        except (OSError, ValueError) as error:
            raise _lost(name, number, "is missing or cannot be found by its hash") from error
        if pin != sha256(document):
            raise _lost(name, number, "is damaged")
        manifest = parse(f"{name}@v{number}", document, number)
        return Version(name, manifest, document, lambda entry: self._read(name, number, entry))

    def pinned(self, name: str, number: int) -> str:
        """The hash of a version's manifest, which may be damaged itself; empty where there is no such version."""
        try:
            return self.layout.version(name, number).read_bytes().decode("ascii", "replace").removesuffix("\n")
        except OSError:
            return ""

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
        entries = entries_of(files)
        with self._writing(name):
            head = self.head(name)
            if expected_head not in {None, head}:
                hint = f"say the same command again, train with --restart: it then begins with v{head}"
                if expected_head:
                    back = f"cpserve adapters rollback {name}@v{expected_head}, then --resume"
                    hint += f"; {back} keeps what train learned, without what v{head} added"
                raise StoreError(f"{name} has moved on: its head is v{head}, not v{expected_head}", hint=hint)
            return self._append(name, head, entries, draft, files)

    def repeat(self, version: Version) -> Version:
        """Store a new version of the same name with the content of an older one; no blob but its manifest's is written.

        Raises:
            IntegrityError: a file of the older version is damaged.
            StoreError: the lock is held or the disk is full; nothing is stored.
        """
        name = version.name
        with self._writing(name):
            for path in version.paths():
                version.read(path)
            return self._append(name, self.head(name), version.manifest.files, version.manifest, {})

    def receive(self, name: str, chain: Sequence[Version], contents: Mapping[str, bytes], origin: Left) -> Version:
        """Store versions that were made elsewhere, byte by byte; only the last one's `contents` come along.

        Args:
            name: what they are called here.
            chain: versions in order, without gaps; those that are here already are only compared.
            contents: files of the last one, checked already; those left out stay where they came from.
            origin: where they come from; its paths say nothing yet.

        Raises:
            StoreError: the name has other versions here, the lock is held or the disk is full.
        """
        with self._writing(name):
            for version in chain:
                self._receive(name, version, contents if version is chain[-1] else {}, origin)
        return self.version(name, chain[-1].manifest.version)

    def left(self, name: str, number: int) -> Left | None:
        """What of a version stayed on the Hub when it was pulled; None where it is all here.

        Raises:
            IntegrityError: its record is damaged.
        """
        try:
            return Left.parse(self.layout.left(name, number).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise damaged(f"{name}@v{number}", f"left/v{number}", "is damaged") from error

    def blob(self, sha256: str) -> Path:
        """Where content of that hash is kept, if it is."""
        return self.layout.blob(sha256)

    def _read(self, name: str, number: int, entry: FileEntry) -> bytes:
        try:
            return self.layout.blob(entry.sha256).read_bytes()
        except FileNotFoundError:
            left = self.left(name, number)
            if not left or entry.path not in left.paths:
                raise
        raise StoreError(
            f"{name}@v{number}: {entry.path} was not pulled",
            hint=f"fetch it: {left.fetching(number, name, for_training=is_training_only(entry.path))}",
        )

    def _receive(self, name: str, version: Version, contents: Mapping[str, bytes], origin: Left) -> None:
        number = version.manifest.version
        pointer, known = self.layout.version(name, number), number <= self.head(name)
        if known and self.pinned(name, number) != version.pin.manifest_sha256:
            raise StoreError(
                f"{name}@v{number} here is another than {version}", hint="keep both: give yours a name with --as NAME"
            )
        if known and not contents:
            self._keep(version.document, [])
            return
        with self._undone_unless(pointer) as fresh:
            for data in (*contents.values(), version.document):
                self._keep(data, fresh)
            sync_folder(self.layout.blobs)
            self._leave(name, version, origin)
            if not known:
                self._point(pointer, version.document)

    def _leave(self, name: str, version: Version, origin: Left) -> None:
        """Record which files of a version are not here."""
        path = self.layout.left(name, version.manifest.version)
        absent = [entry.path for entry in version.manifest.files if not self.layout.blob(entry.sha256).is_file()]
        if not absent:
            path.unlink(missing_ok=True)
            return
        make_folder(path.parent)
        with staged(self.layout.tmp, replace(origin, paths=tuple(absent)).dump()) as temporary:
            temporary.replace(path)
        sync_folder(path.parent)

    def needed(self, without: str = "") -> set[Path]:
        """Every file that some version of an adapter refers to, but for those `without`.

        Raises:
            IntegrityError: a version is damaged.
        """
        found: set[Path] = set()
        for name in (each for each in self.names() if each != without):
            for number in range(1, self.head(name) + 1):
                version = self.version(name, number)
                found |= {self.layout.blob(entry.sha256) for entry in version.manifest.files}
                found |= {self.layout.blob(version.pin.manifest_sha256), self.layout.left(name, number)}
        return found

    def holds(self, content: str) -> bool:
        """Whether the content of that hash is here and whole."""
        blob = self.layout.blob(content)
        return blob.is_file() and sha256(blob.read_bytes()) == content

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep everybody else from writing."""
        with disk_errors():
            make_folder(self.layout.tmp)
            with locked(self.layout.lock):
                yield

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        adapter = self.layout.adapter(name)
        with self.held():
            sweep(self.layout.tmp)
            make_folder(self.layout.blobs)
            make_folder(adapter)
            yield

    def _append(
        self, name: str, head: int, entries: tuple[FileEntry, ...], draft: Manifest, files: Mapping[str, bytes]
    ) -> Version:
        manifest = completed(draft, name, entries, self.version(name, head).pin if head else None)
        document = manifest.dump()
        pointer = self.layout.version(name, manifest.version)
        with self._undone_unless(pointer) as fresh:
            for data in (*files.values(), document):
                self._keep(data, fresh)
            # Contents first, their names next, and only then the one file that refers to them.
            sync_folder(self.layout.blobs)
            self.layout.left(name, manifest.version).unlink(missing_ok=True)  # a killed pull's
            self._point(pointer, document)
        return self.version(name, manifest.version)

    def _point(self, pointer: Path, document: bytes) -> None:
        with staged(self.layout.tmp, f"{sha256(document)}\n".encode()) as temporary:
            temporary.replace(pointer)  # overwrites nothing: the number is the next one, and the lock is held
        sync_folder(pointer.parent)

    @contextmanager
    def _undone_unless(self, pointer: Path) -> Iterator[list[Path]]:
        """Collect fresh blobs; if the version does not come to be, nothing refers to them, and a full disk wants the space."""
        fresh: list[Path] = []
        try:
            yield fresh
        except BaseException:
            if not pointer.exists():
                for blob in fresh:
                    blob.unlink(missing_ok=True)
            raise

    def _keep(self, data: bytes, fresh: list[Path]) -> None:
        """Store a blob, unless it is there and whole; one that is not whole is mended."""
        blob = self.layout.blob(sha256(data))
        known = blob.is_file()
        if known and blob.read_bytes() == data:
            return
        with staged(self.layout.tmp, data) as temporary:
            temporary.replace(blob)
        if not known:
            fresh.append(blob)


def _lost(name: str, number: int, what: str) -> IntegrityError:
    """A version whose manifest is damaged, so that nobody knows what it is made of."""
    return IntegrityError(
        f"{name}@v{number}: {MANIFEST} {what}",
        hint=f"if it is on the Hub, pull it again: cpserve adapters pull hf://USER/REPO@v{number} --as {name} (or --as OTHER, "
        f"beside it); else give it up: cpserve adapters delete {name}",
        path=MANIFEST,
    )


def listed(folder: Path) -> list[str]:
    """Names in a folder, sorted; what desktops leave there is none of ours."""
    return sorted(name for name in _names_in(folder) if re.fullmatch(NAME_PATTERN, name))


def _names_in(folder: Path) -> list[str]:
    with disk_errors():
        # iterdir makes a path of each, a third of a listing's time
        return os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208
