"""The adapter store as everybody else uses it: references in, versions out, from this machine or from the Hub.

Knows references and which of the two stores they mean. Does not know tensors; how versions lie on the disk is `local.py`'s,
how on the Hub `hub.py`'s, which is imported when a reference asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from adapter_store.aliases import alias_names, aliased, remove_alias, set_alias
from adapter_store.checkout import checkout
from adapter_store.local import LocalStore
from adapter_store.plan import GcPlan, delete, plan_gc
from adapter_store.ref import Ref, no_alias
from adapter_store.verify import Problem, problems
from adapter_store.version import Version
from cpserve.errors import RefError, StoreError
from cpserve.manifest import Manifest, check_name

if TYPE_CHECKING:
    from adapter_store.hub import HubStore
    from adapter_store.transfer import Moved

__all__ = ["GcPlan", "Problem", "Ref", "Store", "Version"]


class Store:
    """Adapters by name and version under `root`: by default `$CPSERVE_HOME`, or `~/.local/share/cpserve`.

    Wherever a name or reference is asked for, `hf://user/repo` is one too: `endpoint` and `token_file` say which Hub and who
    asks, by default `HF_ENDPOINT` and `HF_TOKEN`. Constructing a store touches no disk and no network. Any number of
    processes may use the same root at once.
    """

    def __init__(
        self, root: str | Path | None = None, *, endpoint: str | None = None, token_file: Path | None = None
    ) -> None:
        if root is None:
            home = os.environ.get("CPSERVE_HOME")
            root = home or Path.home() / ".local" / "share" / "cpserve"
        self.root = Path(root)
        self._local = LocalStore(self.root)
        self._endpoint, self._token_file = endpoint, token_file

    @cached_property
    def _hub(self) -> HubStore:
        from adapter_store.hub import HubStore
        from cpserve.tokens import connect

        return HubStore(connect(self._endpoint, self._token_file))

    def names(self) -> list[str]:
        """Names with at least one version here, sorted."""
        return self._local.names()

    def head(self, name: str) -> int:
        """The newest version's number, 0 where there is none."""
        repo = _repo(name)
        return self._hub.head(repo).number if repo else self._local.head(name)

    def commit(self, name: str, files: Mapping[str, bytes], draft: Manifest, *, expected_head: int | None) -> Version:
        """Store a new version from files (posix path below its root -> content) and what the trainer knows of it.

        The store fills the draft's name, version, created, previous and files, and the new version's number into each
        concept whose `since` is 0. With `expected_head` None the version follows whatever the head is.

        Raises:
            RefError: the name cannot be one.
            StoreError: the head is not the expected one, a path is refused, the disk is full, or the Hub refuses; nothing
                is stored.
        """
        repo = _repo(name)
        if repo:
            return self._hub.commit(repo, files, draft, expected_head=expected_head)
        return self._local.commit(name, files, draft, expected_head=expected_head)

    def version(self, ref: Ref | str | Version) -> Version:
        """The version that a reference stands for; one that was found already stands for itself.

        Raises:
            IntegrityError: its manifest is damaged.
            RefError: the reference is malformed, or the name, version or alias does not exist.
            StoreError: the Hub cannot be asked.
        """
        if isinstance(ref, Version):
            return ref
        ref = Ref.parse(ref) if isinstance(ref, str) else ref
        return self._hub.resolve(ref) if ref.hub else self._local.version(ref.name, self._number(ref))

    def log(self, name: str) -> list[Manifest]:
        """All manifests, newest first, their lineage checked.

        Raises:
            IntegrityError: a manifest is missing, damaged, or not the one that its successor follows.
            RefError: there is no adapter of that name.
            StoreError: the Hub cannot be asked.
        """
        repo = _repo(name)
        if not repo:
            self._existing_head(name)
        chain = self._hub.chain(repo) if repo else self._local.chain(name)
        return [version.manifest for version in chain]

    def aliases(self, name: str) -> dict[str, int]:
        """Each alias and the number of the version that it stands for.

        Raises:
            IntegrityError: an alias's file is damaged.
            RefError: there is no adapter of that name.
            StoreError: the Hub cannot be asked.
        """
        repo = _repo(name)
        if repo:
            return self._hub.aliases(repo)
        self._existing_head(name)
        return {alias: aliased(self._local, name, alias) for alias in alias_names(self._local, name)}

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Make an alias stand for a version, whatever it stood for before.

        Raises:
            RefError: the alias is reserved (`latest`, `vN`, hex digits) or malformed, or there is no such version.
            StoreError: the Hub or the disk refuses.
        """
        repo = _repo(name)
        if repo:
            self._hub.set_alias(repo, alias, version)
        else:
            set_alias(self._local, name, alias, version)

    def remove_alias(self, name: str, alias: str) -> None:
        """Make an alias stand for nothing; the version stays.

        Raises:
            RefError: the adapter has no such alias.
            StoreError: the Hub or the disk refuses.
        """
        repo = _repo(name)
        if repo:
            self._hub.remove_alias(repo, alias)
        else:
            self._existing_head(name)
            remove_alias(self._local, name, alias)

    def rollback(self, ref: Ref | str | Version) -> Version:
        """Store a new version with an older one's content; history is never rewritten. On the Hub no file is uploaded.

        Raises:
            IntegrityError: a file of the older version is damaged.
            RefError: the reference is malformed or stands for nothing.
            StoreError: the Hub refuses, or the disk is full.
        """
        version = self.version(ref)
        return self._hub.repeat(version) if version.commit else self._local.repeat(version)

    def delete(self, name: str) -> tuple[int, int]:
        """Delete an adapter that is here, and what no other one shares; how many versions and bytes those were.

        Raises:
            RefError: there is no adapter of that name here.
            IntegrityError: another adapter is damaged, so that what it shares is not known; nothing was deleted.
            StoreError: the system refuses. Said again, it goes on where it was.
        """
        self.check_here(name)
        return delete(self._local, name)

    def check_here(self, name: str) -> None:
        """Whether something of an adapter is here, be it what a killed `delete` left.

        Raises:
            RefError: there is nothing.
        """
        if not self._local.layout.adapter(name).exists():
            self._existing_head(name)

    def verify(self, name: str | None = None) -> list[Problem]:
        """Read everything of one adapter, or of all that are here, and tell what is damaged; empty means whole.

        Raises:
            RefError: there is no adapter of that name.
            StoreError: the Hub cannot be asked.
        """
        repo = _repo(name) if name else None
        if repo:
            from adapter_store.hub_verify import hub_problems

            return list(hub_problems(self._hub, repo))
        if name is not None:
            self._existing_head(name)
        return [problem for each in ([name] if name else self.names()) for problem in problems(self._local, each)]

    def repair(self, name: str) -> list[str]:
        """Set tags on the Hub that are missing or were moved; those that were.

        Raises:
            IntegrityError: the lineage itself is damaged.
            StoreError: the adapter is not on the Hub, or the Hub refuses.
        """
        repo = _repo(name)
        if not repo:
            raise StoreError(
                f"{name} is here, where only tags on the Hub can be repaired",
                hint="pull the version again, or store its files again, which mends them",
            )
        from adapter_store.hub_verify import repair

        return repair(self._hub, repo)

    def pull(self, ref: Ref | str, name: str | None = None, *, for_training: bool = False) -> Moved:
        """Fetch a version from the Hub, every byte checked; by default it is called as its repository is.

        Args:
            ref: the version, as `hf://user/repo@v3`.
            name: what to call it here.
            for_training: also what only learning the next concept needs.

        Raises:
            IntegrityError: a file is not what the manifest promises; it is named and nothing is stored.
            RefError: the reference is malformed or stands for nothing.
            StoreError: the name has other versions here, a limit is passed, or the Hub or the disk refuses.
        """
        from adapter_store import transfer

        ref = transfer.pullable(ref)
        name = check_name(name or ref.local_name)
        return transfer.pull(self._local, self._hub, ref, name, for_training=for_training)

    def push(self, name: str, to: Ref | str, *, public: bool = False) -> Moved:
        """Commit to the Hub every version that it does not have; a new repository is private unless `public`.

        Raises:
            IntegrityError: a version here is damaged.
            RefError: there is no adapter of that name, or the repository may not be written.
            StoreError: the Hub has other versions, or refuses.
        """
        from adapter_store import transfer

        to = transfer.pullable(to)
        if to.at is not None:
            raise StoreError(f"{to} names a version", hint=f"push to hf://{to.name}: versions keep their numbers")
        self._existing_head(name)
        return transfer.push(self._local, self._hub, name, to.name, private=not public)

    def unfinished(self) -> list[str]:
        """Names of adapters of which a training was stopped, sorted: `run` keeps latents of its pictures. On a disk that can only
        be read nobody can tell, and none is named.
        """
        return self._local.unfinished()

    def run(self, name: str) -> Path:
        """The folder in which a training keeps what it needs to go on; the lock that it holds is `run_lock`.

        Raises:
            RefError: the name cannot be one.
        """
        return self._local.layout.run(name)

    def run_lock(self, name: str) -> Path:
        """See `run`."""
        return self._local.layout.run_lock(name)

    def plan_gc(self) -> GcPlan:
        """What nothing here refers to any more.

        Raises:
            IntegrityError: a version is damaged, so that what it refers to is not known.
        """
        return plan_gc(self._local)

    def checkout(self, ref: Ref | str | Version, folder: Path, *, for_training: bool = False) -> Path:
        """Write a version as an ordinary folder that plain diffusers loads; all of it appears at once.

        Args:
            ref: the version.
            folder: where to; it may exist if it is empty.
            for_training: also what only learning the next concept needs.

        Raises:
            IntegrityError: a file is damaged.
            RefError: the reference is malformed or stands for nothing.
            StoreError: the folder is not empty, the Hub cannot be asked, or the disk is full.
        """
        return checkout(self.version(ref), folder, for_training=for_training)

    def _existing_head(self, name: str) -> int:
        head = self._local.head(name)
        if not head:
            known = ", ".join(self.names())
            raise RefError(
                f"there is no adapter {name!r}",
                ref=name,
                hint=f"adapters here: {known}" if known else "learn one first: cpserve train",
            )
        return head

    def _number(self, ref: Ref) -> int:
        head = self._existing_head(ref.name)
        if ref.alias is not None:
            aliases = alias_names(self._local, ref.name)
            if ref.alias not in aliases:
                raise no_alias(ref.name, ref.alias, aliases)
            return aliased(self._local, ref.name, ref.alias)
        if ref.version is not None and ref.version > head:
            raise RefError(f"there is no {ref}", ref=str(ref), hint=f"the newest is {ref.name}@v{head}")
        return ref.version or head


def _repo(name: str) -> str | None:
    """`user/repo` if the name is one on the Hub."""
    if not name.startswith("hf://"):
        return None
    ref = Ref.parse(name)
    if ref.at is not None:
        raise RefError(f"{name} names a version, not an adapter", ref=name, hint=f"write hf://{ref.name}")
    return ref.name
