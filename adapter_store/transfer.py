"""Versions from the Hub into the local store and back: the same documents on both sides, byte by byte.

Knows both stores. What is there already is neither sent nor fetched.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapter_store.hub import HubStore, moved_on
from adapter_store.layout import check_paths, is_training_only
from adapter_store.limits import check_announced, check_limits
from adapter_store.local import LocalStore
from adapter_store.partial import Left
from adapter_store.ref import Ref
from adapter_store.version import Version
from cpserve.errors import StoreError


@dataclass(frozen=True)
class Moved:
    """What a push or pull did: the newest version on the receiving side, and the versions and files that came anew."""

    version: Version
    versions: tuple[int, ...]
    files: tuple[str, ...]


def pull(local: LocalStore, hub: HubStore, ref: Ref, name: str, *, for_training: bool) -> Moved:
    """Fetch a version, and of those before it the manifests: their lineage is checked, their files stay on the Hub.

    Raises:
        IntegrityError: a file or manifest is not what it should be; it is named, and nothing is stored.
        RefError: the reference stands for nothing.
        StoreError: `name` has other versions here, a limit is passed, or the Hub or the disk refuses.
    """
    version = hub.resolve(ref)
    number = version.manifest.version
    check_paths(version.paths())
    wanted = [e for e in version.manifest.files if for_training or not is_training_only(e.path)]
    missing = [e for e in wanted if not local.holds(e.sha256)]
    known = local.pinned(name, number) == version.pin.manifest_sha256
    if known and not missing and local.holds(version.pin.manifest_sha256):
        return Moved(local.version(name, number), (), ())
    check_limits(str(ref), missing, local.root)
    if missing and not hub.client(ref.name).offline:
        there = hub.client(ref.name).sizes(version.commit, [e.path for e in missing])
        check_announced(str(version), missing, there)
    contents = {e.path: version.read(e.path) for e in missing}
    chain = [version] if known else _lineage(local, hub, ref.name, version, name)
    head = local.head(name)
    stored = local.receive(name, chain, contents, Left(f"hf://{ref.name}", (), hub.endpoint))
    return Moved(stored, tuple(range(head + 1, number + 1)), tuple(contents))


def _lineage(local: LocalStore, hub: HubStore, repo: str, version: Version, name: str) -> list[Version]:
    """The versions up to this one that are not here, oldest first, after one that is, where there is one."""
    found: list[Version] = []
    for each in hub.chain(repo, newest=version):
        found.append(each)
        if local.pinned(name, each.manifest.version) == each.pin.manifest_sha256:
            break
    return found[::-1]


def push(local: LocalStore, hub: HubStore, name: str, repo: str, *, private: bool) -> Moved:
    """Commit every version that the Hub does not have, oldest first; whatever was pushed stays if a later one fails.

    Raises:
        IntegrityError: a version here is damaged; it and what follows is not pushed.
        StoreError: the Hub's versions are others, the files of one are not here, or the Hub refuses.
    """
    versions = list(local.chain(name))[::-1]
    hub.client(repo).ensure(private=private)
    now = hub.head(repo)
    if now.version and (now.number > len(versions) or versions[now.number - 1].pin != now.version.pin):
        if _is_behind(hub, repo, versions[-1]):
            return Moved(versions[-1], (), ())
        raise moved_on(f"hf://{repo}", now, str(versions[-1]), name)
    if now.version and f"v{now.number}" not in hub.client(repo).refs().tags:  # of a push that was killed
        hub.tag(hub.resolve(Ref(repo, f"v{now.number}", hub=True)))
    pushed: list[int] = []
    for version in versions[now.number :]:
        left = local.left(name, version.manifest.version)
        if left:  # a fork of what was pulled: the rest comes from where that came from
            number = version.manifest.version
            if left.endpoint not in {"", hub.endpoint}:
                raise StoreError(
                    f"{version} is not all here, and the rest is at {left.endpoint}",
                    hint=f"fetch it first: {left.fetching(number, name)}",
                )
            pull(local, hub, Ref.parse(f"{left.origin}@v{number}"), name, for_training=True)
        for path in version.paths():
            version.read(path)  # so that nothing damaged is published
        paths = {entry.path: local.blob(entry.sha256) for entry in version.manifest.files}
        hub.append(repo, version, paths)
        pushed.append(version.manifest.version)
    return Moved(versions[-1], tuple(pushed), ())


def _is_behind(hub: HubStore, repo: str, version: Version) -> bool:
    """Whether the Hub has this very version, and newer ones."""
    return any(each.pin == version.pin for each in hub.chain(repo))


def pullable(ref: Ref | str) -> Ref:
    """The reference, if it is one to the Hub.

    Raises:
        RefError: it is malformed.
        StoreError: it is a local name.
    """
    ref = Ref.parse(ref) if isinstance(ref, str) else ref
    if not ref.hub:
        raise StoreError(f"{ref} is no reference to the Hub", hint=f"write hf://user/{ref.name}")
    return ref
