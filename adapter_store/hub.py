"""The store on the Hub: one repository is one adapter, one commit a version, a tag `vN` or an alias an index onto its commit.

Speaks the local store's verbs, with `user/repo` for a name. The manifests define the versions: a tag that is missing or was
moved is found out by them, and by the history, whose commits name the manifest that they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationCopy

from adapter_store.hub_client import HubClient
from adapter_store.hub_publish import Draft, Head, landed, marked, publish, version_at
from adapter_store.layout import MANIFEST, check_paths
from adapter_store.limits import check_announced
from adapter_store.ref import Ref, check_alias, no_alias
from adapter_store.version import Version, check_previous, completed, damaged, entries_of
from cpserve.errors import CpserveError, IntegrityError, RefError, StoreError
from cpserve.manifest import Manifest, Parent
from cpserve.tokens import Connection

AT_ONCE = 8  # requests for manifests of a long history


class HubStore:
    """Versions in repositories of one Hub; constructing it asks nothing."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def endpoint(self) -> str:
        """The Hub's address."""
        return self._connection.endpoint

    def client(self, repo: str) -> HubClient:
        """For requests to one repository."""
        return HubClient(self._connection, repo)

    def head(self, repo: str) -> Head:
        """The branch as it is now."""
        client = self.client(repo)
        main = client.refs().main
        if main is None or not client.sizes(main, [MANIFEST]):
            return Head(main, None)
        return Head(main, version_at(client, main, str(client)))

    def resolve(self, ref: Ref) -> Version:
        """The version that a reference stands for, pinned to its commit.

        A version or a commit that was read before is found offline. What moves, `latest` and aliases, is asked for, unless
        the user forbids it.

        Raises:
            IntegrityError: the manifest is damaged, or the tag was moved to another version.
            RefError: the repository, version or alias does not exist, or may not be read.
            StoreError: the Hub cannot be asked.
        """
        client = self.client(ref.name)
        if ref.version:
            return self._numbered(client, ref, ref.version)
        if ref.commit:
            return version_at(client, client.locate(ref.commit), str(ref))
        if client.offline:
            return version_at(client, client.locate(ref.alias or "main"), str(ref))
        if ref.alias:
            return self._aliased(client, ref, ref.alias)
        newest = self.head(ref.name).version
        if newest is None:
            raise RefError(
                f"{ref} holds no version", ref=str(ref), hint=f"store one: cpserve adapters push NAME {client}"
            )
        tagged = client.refs().tags.get(f"v{newest.manifest.version}")
        client.remember("main")
        # Whoever edits the card in the browser makes a commit that is no version: the tag still knows the version's own.
        exact = version_at(client, tagged, str(ref)) if tagged else newest
        return exact if exact.pin == newest.pin else newest

    def _aliased(self, client: HubClient, ref: Ref, alias: str) -> Version:
        tags = client.refs().tags
        if alias not in tags:
            raise no_alias(str(client), alias, self.alias_tags(ref.name, tags))
        client.remember(alias)
        return version_at(client, tags[alias], str(ref))

    def _numbered(self, client: HubClient, ref: Ref, number: int) -> Version:
        try:
            version = version_at(client, client.locate(f"v{number}"), str(ref))
        except RefError:
            return self._untagged(client, ref, number)
        if version.manifest.version != number:
            raise IntegrityError(
                f"the tag {ref} was moved: it points to v{version.manifest.version}",
                hint=f"put it back: cpserve adapters verify {client} --repair",
                path=MANIFEST,
            )
        self._check_followed(client, version)
        return version

    def _check_followed(self, client: HubClient, version: Version) -> None:
        """Check that the next version follows this one, where there is a next one and the Hub can be asked."""
        following = f"v{version.manifest.version + 1}"
        try:
            commit = None if client.offline else client.refs().tags.get(following)
            after = version_at(client, commit, f"{client}@{following}") if commit else None
        except StoreError:
            return  # the next version's own trouble; and a version that was pulled once needs no Hub
        if after and after.manifest.version == version.manifest.version + 1 and after.manifest.previous != version.pin:
            raise IntegrityError(
                f"the tag {version} was moved: {following} follows another version than it points to",
                hint=f"put it back: cpserve adapters verify {client} --repair",
                path=MANIFEST,
            )

    def _untagged(self, client: HubClient, ref: Ref, number: int) -> Version:
        """A version whose tag was never set or is lost: its commit says so itself."""
        for made in client.history():
            if made.title.startswith(f"v{number}:"):
                return version_at(client, made.commit, str(ref), number)
        newest = self.head(ref.name).number
        hint = f"the newest is {client}@v{newest}" if newest else f"store one: cpserve adapters push NAME {client}"
        raise RefError(f"there is no {ref}", ref=str(ref), hint=hint)

    def chain(self, repo: str, *, newest: Version | None = None) -> Iterator[Version]:
        """All versions, newest first, or those up to one; each is the one that its successor pins, whatever the tags say.

        Raises:
            IntegrityError: one is missing, damaged or does not fit.
            RefError: the repository holds no version.
        """
        client = self.client(repo)
        version: Version | None = newest or self.resolve(Ref(repo, hub=True))
        commits = marked(client)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(partial(_fetch, client), commits.values()))
        while version:
            check_previous(version)
            yield version
            pin = version.manifest.previous
            version = self._before(client, version, pin, commits) if pin else None

    def _before(self, client: HubClient, version: Version, pin: Parent, commits: Mapping[str, str]) -> Version:
        ref = f"{client}@v{pin.version}"
        commit = commits.get(pin.manifest_sha256) or client.locate(f"v{pin.version}")
        before = version_at(client, commit, ref, pin.version)
        if before.pin != pin:
            raise damaged(ref, MANIFEST, f"is not the one that v{version.manifest.version} follows")
        return before

    def aliases(self, repo: str) -> dict[str, int]:
        """Each alias and the number of the version that it stands for; tags of what is no sound version are left out."""
        client, found = self.client(repo), {}
        tags = client.refs().tags
        for tag in self.alias_tags(repo, tags):
            with suppress(RefError, IntegrityError):
                found[tag] = version_at(client, tags[tag], f"{client}@{tag}").manifest.version
        return found

    def alias_tags(self, repo: str, tags: Iterable[str]) -> list[str]:
        """Those of the tags that can be aliases, sorted."""
        return [tag for tag in sorted(tags) if _is_alias(repo, tag)]

    def set_alias(self, repo: str, alias: str, number: int) -> None:
        """Make an alias stand for a version, whatever it stood for before.

        Raises:
            RefError: the alias is reserved or malformed, or there is no such version.
        """
        check_alias(alias)
        version = self.resolve(Ref(repo, f"v{number}", hub=True))
        self.client(repo).tag(alias, version.commit)

    def remove_alias(self, repo: str, alias: str) -> None:
        """Make an alias stand for nothing.

        Raises:
            RefError: the adapter has no such alias.
        """
        client = self.client(repo)
        known = self.alias_tags(repo, client.refs().tags)
        if alias not in known:
            raise no_alias(str(client), alias, known)
        client.untag(alias)

    def commit(self, repo: str, files: Mapping[str, bytes], draft: Manifest, *, expected_head: int | None) -> Version:
        """Store a new version after the head; `expected_head` None follows whatever the head is, also if it moves meanwhile.

        A repository that does not exist is made, for its owner's eyes only.

        Raises:
            StoreError: the head is another, a path is refused, or the Hub refuses; nothing is stored.
        """
        check_paths(files)
        self.client(repo).ensure(private=True)

        def build(now: Head) -> Draft:
            if expected_head not in {None, now.number}:
                raise moved_on(f"hf://{repo}", now, f"what follows v{expected_head}")
            manifest = completed(draft, Ref(repo, hub=True).local_name, entries_of(files), _pin(now))
            return Draft(manifest.dump(), files, _names(manifest))

        return self._published(repo, build)

    def append(self, repo: str, version: Version, paths: Mapping[str, Path]) -> Version:
        """Store a version from here, byte by byte, after the one that it follows; `paths` are its files, checked already.

        Raises:
            StoreError: the head is another, or the Hub refuses; nothing is stored.
        """

        def build(now: Head) -> Draft | Version:
            if _pin(now) != version.manifest.previous:
                there = landed(self.client(repo), {version.pin.manifest_sha256})  # of a push that was killed meanwhile
                if there is None:
                    raise moved_on(f"hf://{repo}", now, str(version), version.name)
                return version_at(self.client(repo), there[0], str(version))
            return Draft(version.document, paths, _names(version.manifest))

        return self._published(repo, build)

    def repeat(self, version: Version) -> Version:
        """Store a new version with the content of an older one; its files are copied on the Hub, none is uploaded.

        Raises:
            IntegrityError: the older version is not whole.
            StoreError: the Hub refuses; nothing is stored.
        """
        repo = version.name.removeprefix("hf://")
        client = self.client(repo)
        there = client.sizes(version.commit, version.paths())
        check_announced(str(version), version.manifest.files, there)
        copies = {path: CommitOperationCopy(path, path, src_revision=version.commit) for path in version.paths()}

        def build(now: Head) -> Draft:
            manifest = completed(version.manifest, version.manifest.name, version.manifest.files, _pin(now))
            return Draft(manifest.dump(), copies, f"{_names(manifest)} (v{version.manifest.version} again)")

        return self._published(repo, build)

    def _published(self, repo: str, build: Callable[[Head], Draft | Version]) -> Version:
        client = self.client(repo)
        made = publish(client, lambda: self.head(repo), build)
        self.tag(made)
        return made

    def tag(self, version: Version) -> None:
        """Set a version's tag, the index onto its commit.

        Raises:
            StoreError: the Hub refuses; the version is stored all the same, and says what it is.
        """
        repo = version.name.removeprefix("hf://")
        try:
            self.client(repo).tag(f"v{version.manifest.version}", version.commit)
        except StoreError as error:
            raise StoreError(
                f"{version} is stored, but its tag is not set: {error}",
                hint=f"set it: cpserve adapters verify {version.name} --repair",
            ) from error


def moved_on(hub: str, now: Head, mine: str, name: str = "NAME") -> StoreError:
    """The refusal of what does not follow the head; `name` is what the user calls the adapter."""
    theirs = f"its head is v{now.number} ({_names(now.version.manifest)})" if now.version else "it is empty"
    return StoreError(
        f"{hub} has moved on: {theirs}, which {mine} does not follow; nothing of yours is lost",
        hint=f"keep both: cpserve adapters push {name} {hub} --fork OTHER; or learn again on top of it: "
        f"cpserve train --adapter {hub} --as OTHER",
    )


def _pin(now: Head) -> Parent | None:
    return now.version.pin if now.version else None


def _is_alias(repo: str, tag: str) -> bool:
    try:
        return Ref(repo, tag, hub=True).alias is not None
    except RefError:
        return False


def _names(manifest: Manifest) -> str:
    return ", ".join(concept.name for concept in manifest.concepts) or manifest.method


def _fetch(client: HubClient, commit: str) -> None:
    """Fill the cache; a commit's message may claim to hold a version, and what its lineage needs is checked when it is read."""
    with suppress(CpserveError):
        client.read(commit, MANIFEST)
