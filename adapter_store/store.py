"""The adapter store as everybody else uses it: references in, versions out.

Knows references and folders. Does not know tensors; how versions lie on the disk is `local.py`'s.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from adapter_store.atomic import disk_errors
from adapter_store.layout import MANIFEST, check_paths, is_training_only
from adapter_store.local import LocalStore
from adapter_store.ref import Ref
from adapter_store.verify import Problem, problems
from adapter_store.version import Version
from cpserve.errors import RefError, StoreError
from cpserve.manifest import Manifest

__all__ = ["Problem", "Ref", "Store", "Version"]


class Store:
    """Adapters by name and version under `root`: by default `$CPSERVE_HOME`, or `~/.local/share/cpserve`.

    Constructing it touches no disk. Any number of processes may use the same root at once.
    """

    def __init__(self, root: Path | None = None) -> None:
        if root is None:
            home = os.environ.get("CPSERVE_HOME")
            root = Path(home) if home else Path.home() / ".local" / "share" / "cpserve"
        self.root = root
        self._local = LocalStore(root)

    def names(self) -> list[str]:
        """Names with at least one version, sorted."""
        return self._local.names()

    def head(self, name: str) -> int:
        """The newest version's number, 0 where there is none."""
        return self._local.head(name)

    def commit(self, name: str, files: Mapping[str, bytes], draft: Manifest, *, expected_head: int | None) -> Version:
        """Store a new version from files (posix path below its root -> content) and what the trainer knows of it.

        The store fills the draft's name, version, created, previous and files, and the new version's number into each
        concept whose `since` is 0. With `expected_head` None the version follows whatever the head is.

        Raises:
            RefError: the name cannot be one.
            StoreError: the head is not the expected one, a path is refused, or the disk is full; nothing is stored.
        """
        return self._local.commit(name, files, draft, expected_head=expected_head)

    def version(self, ref: Ref | str) -> Version:
        """The version that a reference stands for.

        Raises:
            IntegrityError: its manifest is damaged.
            RefError: the reference is malformed, or the name, version or alias does not exist.
            StoreError: it is a reference to the Hub.
        """
        ref = _local_ref(ref)
        return self._local.version(ref.name, self._number(ref))

    def log(self, name: str) -> list[Manifest]:
        """All manifests, newest first, their lineage checked.

        Raises:
            IntegrityError: a manifest is missing, damaged, or not the one that its successor follows.
            RefError: there is no adapter of that name.
        """
        self._existing_head(name)
        return [version.manifest for version in self._local.chain(name)]

    def aliases(self, name: str) -> dict[str, int]:
        """Each alias and the number of the version that it stands for.

        Raises:
            IntegrityError: an alias's file is damaged.
        """
        return {alias: self._local.alias(name, alias) for alias in self._local.alias_names(name)}

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Make an alias stand for a version, whatever it stood for before.

        Raises:
            RefError: the alias is reserved (`latest`, `vN`, hex digits) or malformed, or there is no such version.
        """
        self._local.set_alias(name, alias, version)

    def rollback(self, ref: Ref | str) -> Version:
        """Store a new version with an older one's content; history is never rewritten.

        Raises:
            IntegrityError: a file of the older version is damaged.
            RefError: the reference is malformed or stands for nothing.
            StoreError: it is a reference to the Hub, or the disk is full.
        """
        return self._local.repeat(self.version(ref))

    def verify(self, name: str | None = None) -> list[Problem]:
        """Read everything of one adapter, or of all, and tell what is damaged; empty means whole.

        Raises:
            RefError: there is no adapter of that name.
        """
        if name is not None:
            self._existing_head(name)
        return [problem for each in ([name] if name else self.names()) for problem in problems(self._local, each)]

    def checkout(self, ref: Ref | str, folder: Path, *, for_training: bool = False) -> Path:
        """Write a version as an ordinary folder that plain diffusers loads; all of it appears at once.

        Args:
            ref: the version.
            folder: where to; it may exist if it is empty.
            for_training: also what only learning the next concept needs.

        Raises:
            IntegrityError: a file is damaged.
            RefError: the reference is malformed or stands for nothing.
            StoreError: the folder is not empty, or the disk is full.
        """
        version = self.version(ref)
        check_paths(version.paths())
        wanted = [path for path in version.paths() if for_training or not is_training_only(path)]
        with disk_errors():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise StoreError(f"{folder} is not an empty folder", hint="choose a new folder")
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = folder.parent / f".{folder.name}.{secrets.token_hex(8)}"
            try:
                for path in wanted:
                    _write(temporary / path, version.read(path))
                _write(temporary / MANIFEST, version.document)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def _existing_head(self, name: str) -> int:
        head = self.head(name)
        if not head:
            known = ", ".join(self.names())
            raise RefError(
                f"there is no adapter {name!r}",
                ref=name,
                hint=f"there are {known}" if known else "learn one first: cpserve train",
            )
        return head

    def _number(self, ref: Ref) -> int:
        head = self._existing_head(ref.name)
        if ref.alias is not None:
            aliases = self._local.alias_names(ref.name)
            if ref.alias not in aliases:
                known = ", ".join(["latest", *aliases])
                raise RefError(f"{ref.name} has no alias {ref.alias!r}", ref=str(ref), hint=f"it has {known}")
            return self._local.alias(ref.name, ref.alias)
        if ref.version is not None and ref.version > head:
            raise RefError(f"there is no {ref}", ref=str(ref), hint=f"the newest is {ref.name}@v{head}")
        return ref.version or head


def _local_ref(ref: Ref | str) -> Ref:
    ref = Ref.parse(ref) if isinstance(ref, str) else ref
    if ref.hub:
        raise StoreError(
            f"{ref}: references to the Hub are not in this version", hint="use a local name, such as dog@v3"
        )
    return ref


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
