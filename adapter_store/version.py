"""One stored version: its manifest, and its files, whose bytes are checked each time that they are read.

Does not know where the bytes come from: a version means the same on this disk and on the Hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from msgspec.structs import replace

from adapter_store.layout import MANIFEST
from cpserve.errors import AdapterError, IntegrityError, StoreError
from cpserve.manifest import FileEntry, Manifest, Parent

_MEND = "take another version, or store these files again, which mends them"


@dataclass(frozen=True)
class Version:
    """An immutable adapter version: `document` is its `cpserve.json` byte by byte, `name` where it was found, locally or as
    `hf://user/repo`, and there `commit` is what holds it.
    """

    name: str
    manifest: Manifest
    document: bytes = field(repr=False)
    fetch: Callable[[FileEntry], bytes] = field(repr=False, compare=False)  # raises OSError where there is nothing
    commit: str = ""

    def __str__(self) -> str:
        return f"{self.name}@v{self.manifest.version}"

    @property
    def pin(self) -> Parent:
        """What a later version records to say that it comes after, or was trained from, this one."""
        return Parent(version=self.manifest.version, manifest_sha256=sha256(self.document))

    def paths(self) -> tuple[str, ...]:
        """The files, as posix paths below the version's root, sorted; without `cpserve.json` itself."""
        return tuple(entry.path for entry in self.manifest.files)

    def read(self, path: str) -> bytes:
        """The file's content.

        Raises:
            IntegrityError: the bytes are missing or are not those that the manifest promises.
            StoreError: the version has no such file.
        """
        entry = next((entry for entry in self.manifest.files if entry.path == path), None)
        if entry is None:
            raise StoreError(f"{self} has no file {path!r}", hint=f"it has {', '.join(self.paths()) or 'no files'}")
        try:
            data = self.fetch(entry)
        except OSError as error:
            raise damaged(str(self), path, f"cannot be read ({error.strerror})") from error
        if len(data) != entry.size or sha256(data) != entry.sha256:
            raise damaged(str(self), path, "is damaged")
        return data


def parse(ref: str, document: bytes, number: int | None = None) -> Manifest:
    """The manifest that `ref` stands for, of version `number` where that is known.

    Raises:
        IntegrityError: the document cannot be read, or is another version's.
    """
    try:
        manifest = Manifest.parse(document)
    except AdapterError as error:
        raise IntegrityError(f"{ref}: {error}", hint=error.hint, path=MANIFEST) from error
    if manifest.version < 1 or number not in {None, manifest.version}:
        raise damaged(ref, MANIFEST, f"is that of v{manifest.version}")
    return manifest


def completed(draft: Manifest, name: str, entries: tuple[FileEntry, ...], previous: Parent | None) -> Manifest:
    """The draft as the version after `previous`: what only a store knows is filled in.

    Raises:
        AdapterError: a field is out of range, so that the version could never be read again.
    """
    number = previous.version + 1 if previous else 1
    concepts = tuple(concept if concept.since else replace(concept, since=number) for concept in draft.concepts)
    whole = replace(
        draft,
        name=name,
        version=number,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        previous=previous,
        files=entries,
        concepts=concepts,
    )
    return Manifest.parse(whole.dump())


def entries_of(files: Mapping[str, bytes]) -> tuple[FileEntry, ...]:
    """What a manifest says of files, by path; sorted."""
    return tuple(FileEntry(path=path, size=len(files[path]), sha256=sha256(files[path])) for path in sorted(files))


def check_previous(version: Version) -> None:
    """Check that a version follows the one numbered before it, and the first one none.

    Raises:
        IntegrityError: it does not.
    """
    previous = version.manifest.previous
    if (previous.version if previous else 0) != version.manifest.version - 1:
        raise damaged(str(version), MANIFEST, "does not follow the version before it")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def damaged(ref: str, path: str, what: str) -> IntegrityError:
    return IntegrityError(f"{ref}: {path} {what}", hint=_MEND, path=path)
