"""Where things are: inside a version, the same locally and on the Hub, and inside the local store.

Knows paths only. Nothing here reads or writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from cpserve.errors import StoreError
from cpserve.manifest import FILE_NAME, TRAINING, check_name, folded

CARD = "README.md"
MANIFEST = FILE_NAME
MEASURED = "evaluation.json"
EVALUATION = f"evaluation/{MEASURED}"  # what was measured of the version, where it was
MATRIX = "evaluation/forgetting.png"

_PART = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff/\\:]+")


def is_training_only(path: str) -> bool:
    """Whether only learning the next concept needs it, so that serving leaves it where it is."""
    return PurePosixPath(path).parts[0] == TRAINING


def check_paths(paths: Iterable[str]) -> None:
    """Accept paths that every file system keeps apart and inside one folder.

    Raises:
        StoreError: one is absolute, climbs, has a backslash, colon or control character, is the manifest's own, or
            meets another after folding case and Unicode form.
    """
    taken: set[str] = {MANIFEST}
    folders: set[str] = set()
    for path in sorted(paths):
        parts = path.split("/")
        if len(path) > 200 or not all(_PART.fullmatch(part) and part not in {".", ".."} for part in parts):
            raise _refused(path, "is not a plain relative path of at most 200 characters")
        name = folded(path)
        if name in taken:
            raise _refused(path, "meets another file of the version, or is the manifest's own")
        taken.add(name)
        folders.update(str(parent) for parent in PurePosixPath(name).parents)
    if clash := taken & folders:
        raise _refused(min(clash), "is a file and a folder at once")


def _refused(path: str, rule: str) -> StoreError:
    return StoreError(f"{path!r} {rule}", hint="rename the file before it is stored")


@dataclass(frozen=True)
class LocalLayout:
    """The local store under `root`; names are checked here, so that none can point elsewhere.

    lock                              held while anything is written
    tmp/                              files being written; whatever a killed process leaves here is harmless
    blobs/<sha256>                    contents of files and manifests
    adapters/<name>/v3                the hash of version 3's manifest: the one file that makes a version exist
    adapters/<name>/aliases/prod      the version that an alias stands for, as `v3`
    adapters/<name>/left/v3           of a pulled version, what stayed on the Hub
    runs/<name>/                      what a training that is not finished keeps; the trainer's, gone with its version
    runs/.<name>.lock                 held by it
    """

    root: Path

    @cached_property
    def lock(self) -> Path:
        return self.root / "lock"

    @cached_property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @cached_property
    def adapters(self) -> Path:
        return self.root / "adapters"

    @cached_property
    def runs(self) -> Path:
        return self.root / "runs"

    @cached_property
    def blobs(self) -> Path:
        return self.root / "blobs"

    def blob(self, sha256: str) -> Path:
        return self.blobs / sha256

    def adapter(self, name: str) -> Path:
        return self.adapters / check_name(name)

    def version(self, name: str, version: int) -> Path:
        return self.adapter(name) / f"v{version}"

    def run(self, name: str) -> Path:
        return self.runs / check_name(name)

    def run_lock(self, name: str) -> Path:
        return self.runs / f".{check_name(name)}.lock"  # no adapter's name begins with a dot

    def aliases(self, name: str) -> Path:
        return self.adapter(name) / "aliases"

    def left(self, name: str, version: int) -> Path:
        return self.adapter(name) / "left" / f"v{version}"
