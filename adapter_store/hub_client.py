"""The few things that the store asks of the Hub's client, for one repository.

Knows requests, the client's cache and waiting. Does not know what a version is. What is asked by commit is asked once: the
client's cache answers afterwards, offline too.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from adapter_store.hub_errors import RAISED, hub_errors, is_busy, retry_after, status
from adapter_store.layout import MANIFEST
from adapter_store.version import damaged, sha256
from cpserve.errors import CpserveError, StoreError
from cpserve.tokens import Connection

Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete
T = TypeVar("T")

WAITS_S = (
    0.5,
    1.0,
    2.0,
    4.0,
    8.0,
)  # between tries, each up to half as long again, so that two clients do not stay in step
LONGEST_S = 60.0  # of what the Hub asks to wait
MANIFEST_BYTES = 4 << 20  # of the manifest, which is read before anything is known of the version
BRANCH = "main"


@dataclass(frozen=True)
class Refs:
    """Where the branch and the tags point; `main` is None in a repository without commits."""

    main: str | None
    tags: dict[str, str]


@dataclass(frozen=True)
class Made:
    """A commit of the branch's history and its words."""

    commit: str
    title: str
    message: str


def waits() -> Iterator[float]:
    """Seconds to wait before each further try."""
    return (seconds * random.uniform(1, 1.5) for seconds in WAITS_S)  # noqa: S311 - not a secret


def wait_for(error: BaseException, seconds: float) -> None:
    """Wait, longer where the Hub asks for it."""
    time.sleep(min(max(seconds, retry_after(error)), LONGEST_S))


@dataclass(frozen=True)
class HubClient:
    """One repository, `user/name`, on one Hub."""

    connection: Connection
    repo: str

    def __str__(self) -> str:
        return f"hf://{self.repo}"

    @cached_property
    def _api(self) -> HfApi:
        return HfApi(endpoint=self.connection.endpoint, token=self.connection.token, library_name="cpserve")

    @property
    def offline(self) -> bool:
        """Whether the user forbids requests."""
        return bool(constants.HF_HUB_OFFLINE)

    @property
    def cache(self) -> Path:
        """Where the client keeps what it fetched."""
        return Path(constants.HF_HUB_CACHE)

    def ensure(self, *, private: bool) -> None:
        """Make the repository, unless it is there; one that is there keeps who may see it."""
        with hub_errors(str(self), self.connection.endpoint):
            try:
                _patiently(lambda: self._api.repo_info(self.repo))
            except RepositoryNotFoundError:
                _patiently(lambda: self._api.create_repo(self.repo, private=private, exist_ok=True))

    def refs(self) -> Refs:
        """Where things are now."""
        found = self._ask(lambda: self._api.list_repo_refs(self.repo))
        main = next((branch.target_commit for branch in found.branches if branch.name == BRANCH), None)
        return Refs(main, {tag.name: tag.target_commit for tag in found.tags})

    def history(self) -> list[Made]:
        """The branch's commits, newest first."""
        found = self._ask(lambda: self._api.list_repo_commits(self.repo, revision=BRANCH))
        return [Made(each.commit_id, each.title, each.message) for each in found]

    def locate(self, revision: str) -> str:
        """The commit that a tag, the branch or the beginning of a hash stands for, if it holds a manifest.

        Without a connection the answer is the one that was given the last time.
        """
        with hub_errors(f"{self}@{revision}", self.connection.endpoint):
            try:
                path = _patiently(lambda: self._manifest(revision))
            except RAISED as error:
                if not (is_busy(error) or isinstance(error, OfflineModeIsEnabled)):
                    raise
                path = Path(self._api.hf_hub_download(self.repo, MANIFEST, revision=revision, local_files_only=True))
        return path.parent.name

    def remember(self, revision: str) -> None:
        """Let the cache know what a tag or the branch stands for, so that it can be asked offline; nothing depends on it."""
        with suppress(CpserveError, *RAISED):
            self._manifest(revision)

    def cached(self, commit: str, path: str) -> Path | None:
        """Where the cache keeps a file of a commit, if it does."""
        found = try_to_load_from_cache(self.repo, path, revision=commit)
        return Path(found) if isinstance(found, str) else None

    def read(self, commit: str, path: str, *, anew: bool = False) -> bytes:
        """A file of a commit; `anew` does not trust the cache."""
        cached = self.cached(commit, path)
        if cached and not anew:
            return cached.read_bytes()

        def fetch() -> Path:
            if path == MANIFEST:
                return self._manifest(commit, anew=anew)
            return Path(self._api.hf_hub_download(self.repo, path, revision=commit, force_download=anew))

        return self._ask(fetch, f"{self}@{commit}").read_bytes()

    def sizes(self, commit: str, paths: Sequence[str]) -> dict[str, tuple[int, str | None]]:
        """By path: size in bytes, and the sha256 where the Hub knows it; files that it does not have are left out."""
        found = self._ask(lambda: self._api.get_paths_info(self.repo, list(paths), revision=commit))
        return {
            each.path: (each.size, each.lfs.sha256 if each.lfs else None)
            for each in found
            if isinstance(each, RepoFile)
        }

    def commit(self, operations: Sequence[Operation], parent: str | None, title: str, message: str) -> str:
        """One commit on top of `parent`, once; the new commit. Errors come as the client raises them: it may have landed."""
        made = self._api.create_commit(
            self.repo,
            list(operations),
            commit_message=title,
            commit_description=message,
            parent_commit=parent,
            revision=BRANCH,
        )
        return str(made.oid)

    def tag(self, name: str, commit: str) -> None:
        """Make a tag point to a commit, wherever it pointed before."""
        now = self.refs().tags.get(name)
        if now == commit:
            return
        if now:
            self.untag(name)
        self._ask(lambda: self._api.create_tag(self.repo, tag=name, revision=commit, exist_ok=True))
        if self.refs().tags.get(name) != commit:
            raise StoreError(f"somebody else moved {self}@{name} just now", hint="run the same command again")

    def untag(self, name: str) -> None:
        """Remove a tag; one that is gone already was perhaps removed by a request that was denied."""

        def remove() -> None:
            with suppress(RevisionNotFoundError):
                self._api.delete_tag(self.repo, tag=name)

        self._ask(remove)

    def _manifest(self, revision: str, *, anew: bool = False) -> Path:
        """Fetch a manifest. Nothing else says yet what it should be, so it is held to what the Hub announced of it."""
        url = hf_hub_url(self.repo, MANIFEST, revision=revision, endpoint=self.connection.endpoint)
        told = self._api.get_hf_file_metadata(url=url)
        if told.size is not None and told.size > MANIFEST_BYTES:
            raise StoreError(
                f"{self}@{revision}: {MANIFEST} has {told.size:,} bytes; more than {MANIFEST_BYTES:,} are not read",
                hint="check that this is an adapter of cpserve",
            )
        for again in dict.fromkeys((anew, True)):
            path = Path(self._api.hf_hub_download(self.repo, MANIFEST, revision=revision, force_download=again))
            if _is_announced(path.read_bytes(), told.etag or ""):
                return path
        raise damaged(f"{self}@{revision}", MANIFEST, "did not arrive as the Hub has it")

    def _ask(self, request: Callable[[], T], ref: str | None = None) -> T:
        """What can be asked again without harm is asked again while the Hub is busy."""
        with hub_errors(ref or str(self), self.connection.endpoint):
            return _patiently(request)


def _patiently(request: Callable[[], T]) -> T:
    for seconds in waits():
        try:
            return request()
        except OSError as error:
            if not is_busy(error) or not status(error):
                raise
            wait_for(error, seconds)
    return request()


def _is_announced(data: bytes, etag: str) -> bool:
    """Whether bytes have the hash that the Hub calls them by: git's for small files, sha256 for large ones."""
    if len(etag) == 64:
        return sha256(data) == etag
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return git == etag or len(etag) != 40  # what is called otherwise says nothing
