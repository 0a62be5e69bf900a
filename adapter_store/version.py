"""One stored version: its manifest, and its files, whose bytes are checked each time that they are read.

Does not know where the bytes come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from adapter_store.layout import MANIFEST
from cpserve.errors import AdapterError, IntegrityError, StoreError
from cpserve.manifest import FileEntry, Manifest, Parent

_MEND = "take another version, or store these files again, which mends them"


@dataclass(frozen=True)
class Version:
    """An immutable adapter version; `document` is its `cpserve.json` byte by byte."""

    manifest: Manifest
    document: bytes = field(repr=False)
    fetch: Callable[[FileEntry], bytes] = field(repr=False, compare=False)  # raises OSError where there is nothing

    def __str__(self) -> str:
        return f"{self.manifest.name}@v{self.manifest.version}"

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


def parse(name: str, number: int, document: bytes) -> Manifest:
    """The manifest of that version.

    Raises:
        IntegrityError: the document cannot be read, or is another version's.
    """
    ref = f"{name}@v{number}"
    try:
        manifest = Manifest.parse(document)
    except AdapterError as error:
        raise IntegrityError(f"{ref}: {error}", hint=error.hint, path=MANIFEST) from error
    if (manifest.name, manifest.version) != (name, number):
        raise damaged(ref, MANIFEST, f"is that of {manifest.name}@v{manifest.version}")
    return manifest


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def damaged(ref: str, path: str, what: str) -> IntegrityError:
    return IntegrityError(f"{ref}: {path} {what}", hint=_MEND, path=path)
