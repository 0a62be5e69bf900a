"""Finding every damaged byte of the local store: pointers, manifests, lineage, files, aliases.

Reads all and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapter_store.aliases import alias_names, aliased
from adapter_store.layout import MANIFEST
from adapter_store.local import LocalStore
from adapter_store.version import Version, check_previous, damaged
from cpserve.errors import IntegrityError


@dataclass(frozen=True)
class Problem:
    """Something damaged: the version or alias, its file, and the sentence that says what is wrong."""

    ref: str
    path: str
    what: str


def problems(store: LocalStore, name: str) -> Iterator[Problem]:
    """Everything that is wrong with one adapter's versions and aliases, oldest first."""
    before: Version | None = None
    for number in range(1, store.head(name) + 1):
        ref = f"{name}@v{number}"
        try:
            version = store.version(name, number)
        except IntegrityError as error:
            yield Problem(ref, error.path, str(error))
            before = None
            continue
        for fault in (*_lineage_errors(version, before), *_file_errors(store, version)):
            yield Problem(ref, fault.path, str(fault))
        before = version
    for alias in alias_names(store, name):
        try:
            aliased(store, name, alias)
        except IntegrityError as error:
            yield Problem(f"{name}@{alias}", error.path, str(error))


def _lineage_errors(version: Version, before: Version | None) -> Iterator[IntegrityError]:
    try:
        check_previous(version)
    except IntegrityError as error:
        yield error
    if before and version.manifest.previous != before.pin:
        yield damaged(str(version), MANIFEST, f"does not follow {before} as it is now")


def _file_errors(store: LocalStore, version: Version) -> Iterator[IntegrityError]:
    absent: set[str] = set()
    try:
        left = store.left(version.name, version.manifest.version)
        absent = {
            e.path
            for e in version.manifest.files
            if left and e.path in left.paths and not store.blob(e.sha256).is_file()
        }
    except IntegrityError as error:
        yield error
    for path in version.paths():
        if path not in absent:
            try:
                version.read(path)
            except IntegrityError as error:
                yield error
