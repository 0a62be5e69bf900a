"""Putting one version on the Hub: one atomic commit on top of what is there, whoever else is committing.

A try that failed may have landed all the same, so before every next one the history is read: no version is stored twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

from adapter_store.hub_client import WAITS_S, HubClient, Operation, wait_for, waits
from adapter_store.hub_errors import RAISED, cause, explained, is_busy, is_moved
from adapter_store.layout import MANIFEST, check_paths
from adapter_store.limits import check_announced, check_limits
from adapter_store.version import Version, parse, sha256
from cpserve.errors import IntegrityError
from cpserve.manifest import FileEntry, Manifest

OVERTAKEN = 40  # how often somebody else may be first before we give up
_MARK = "manifest sha256 "  # in a commit's message, before the hash that lineage pins

Content = bytes | Path | CommitOperationCopy


@dataclass(frozen=True)
class Head:
    """What the branch holds: its commit, and the newest version, None where there is none yet."""

    commit: str | None
    version: Version | None

    @property
    def number(self) -> int:
        return self.version.manifest.version if self.version else 0


@dataclass(frozen=True)
class Draft:
    """A version about to be committed: its document, its files by path, and the commit's first line after `vN: `."""

    document: bytes
    contents: Mapping[str, Content]
    title: str


def words(draft: Draft) -> tuple[str, str]:
    """A commit's first line and the rest."""
    return f"v{Manifest.parse(draft.document).version}: {draft.title}", f"{_MARK}{sha256(draft.document)}"


def landed(client: HubClient, documents: set[str]) -> tuple[str, str] | None:
    """The commit of one of these documents' hashes, and the hash, if one is in the history."""
    if not documents:
        return None
    for made in client.history():
        found = next((digest for digest in documents if _MARK + digest in made.message), None)
        if found and sha256(client.read(made.commit, MANIFEST)) == found:
            return made.commit, found
    return None


def marked(client: HubClient) -> dict[str, str]:
    """By manifest hash, the commit that claims to hold it; a claim, to be checked by reading."""
    claims: dict[str, str] = {}
    for made in client.history():
        if _MARK in made.message:
            claims[made.message.partition(_MARK)[2][:64]] = made.commit
    return claims


def publish(client: HubClient, head: Callable[[], Head], build: Callable[[Head], Draft | Version]) -> Version:
    """Commit what `build` makes of the head, building anew whenever the head has moved; the version as it landed.

    `build` may answer with a version that has landed already.

    Raises:
        StoreError: `build` refused, the Hub refused, or it stayed busy; nothing is half stored.
    """
    sent: dict[str, Draft] = {}
    busy = waits()
    for _ in range(OVERTAKEN):
        now = head()
        draft = build(now)
        if isinstance(draft, Version):
            return draft
        sent[sha256(draft.document)] = draft
        title, message = words(draft)
        try:
            commit = client.commit(_operations(client, now, draft), now.commit, title, message)
        except RAISED as wrapped:
            error = cause(wrapped)
            # A wrapped error is an upload's, which the client has tried often enough already.
            if error is not wrapped or not (is_moved(error) or is_busy(error)):
                raise explained(error, str(client), client.connection.endpoint) from error
            found = landed(client, set(sent))
            if found:
                return _version(client, found[0], sent[found[1]].document)
            if is_moved(error):
                wait_for(error, random.uniform(0, WAITS_S[0]))  # noqa: S311 - not a secret
                last = error
                continue
            seconds = next(busy, None)
            if seconds is None:
                raise explained(error, str(client), client.connection.endpoint) from error
            wait_for(error, seconds)
            last = error
        else:
            return _version(client, commit, draft.document)
    raise explained(last, str(client), client.connection.endpoint) from last


def version_at(client: HubClient, commit: str, ref: str, number: int | None = None) -> Version:
    """The version that a commit holds.

    Raises:
        IntegrityError: its manifest cannot be read, or is another version's.
    """
    document = client.read(commit, MANIFEST)
    try:
        parse(ref, document, number)
    except IntegrityError:
        if client.offline:
            raise
        document = client.read(commit, MANIFEST, anew=True)  # the cache may be what is damaged
        parse(ref, document, number)
    return _version(client, commit, document)


def _version(client: HubClient, commit: str, document: bytes) -> Version:
    manifest = Manifest.parse(document)
    ref = f"{client}@v{manifest.version}"

    @cache
    def there() -> Mapping[str, tuple[int, str | None]]:
        return client.sizes(commit, [entry.path for entry in manifest.files])

    def fetch(entry: FileEntry) -> bytes:
        check_paths([entry.path])  # the cache would look wherever a path leads
        if not (client.offline or client.cached(commit, entry.path)):
            check_limits(ref, [entry], client.cache)
            check_announced(ref, [entry], there())
        data = client.read(commit, entry.path)
        if sha256(data) != entry.sha256 and not client.offline:  # the cache never looks at what is in it
            data = client.read(commit, entry.path, anew=True)
        return data

    return Version(str(client), manifest, document, fetch, commit)


def _operations(client: HubClient, now: Head, draft: Draft) -> list[Operation]:
    """Made anew for every try: the client changes them. What was deleted on the Hub by hand is not deleted once more."""
    operations: list[Operation] = []
    for path, content in sorted(draft.contents.items()):
        if isinstance(content, CommitOperationCopy):
            operations.append(CommitOperationCopy(content.src_path_in_repo, path, src_revision=content.src_revision))
        else:
            operations.append(CommitOperationAdd(path, content))
    operations.append(CommitOperationAdd(MANIFEST, draft.document))
    old = [path for path in (now.version.paths() if now.version else ()) if path not in draft.contents]
    there = client.sizes(now.commit, old) if now.commit and old else {}
    return [*operations, *(CommitOperationDelete(path, is_folder=False) for path in there)]
