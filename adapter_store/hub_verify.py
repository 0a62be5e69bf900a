"""Finding, on the Hub, every damaged byte and every tag that does not index its version; and setting such tags right.

Reads everything, each content once; `repair` moves tags and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from adapter_store.hub import HubStore
from adapter_store.verify import Problem
from adapter_store.version import Version
from cpserve.errors import IntegrityError


def hub_problems(store: HubStore, repo: str) -> Iterator[Problem]:
    """Everything that is wrong with one repository, newest first; tags last."""
    versions: list[Version] = []
    read: set[str] = set()
    hub = f"hf://{repo}"
    try:
        for version in store.chain(repo):
            versions.append(version)
            yield from _file_problems(version, read)
    except IntegrityError as error:
        yield Problem(hub, error.path, str(error))
    tags = store.client(repo).refs().tags
    for tag, commit in _index(versions).items():
        if tags.get(tag) != commit:
            what = "points to another commit than its version's" if tag in tags else "is missing"
            yield Problem(f"{hub}@{tag}", f"tags/{tag}", f"{hub}: the tag {tag} {what}")
    known = {version.commit for version in versions}
    for tag in store.alias_tags(repo, tags):
        if tags[tag] not in known:
            yield Problem(f"{hub}@{tag}", f"tags/{tag}", f"{hub}: the alias {tag} points to no version")


def repair(store: HubStore, repo: str) -> list[str]:
    """Set every version's tag to its commit, found by the lineage; the tags that were wrong.

    Raises:
        IntegrityError: the lineage itself is damaged: then nothing says where the tags belong.
    """
    client = store.client(repo)
    index = _index(list(store.chain(repo)))
    tags = client.refs().tags
    wrong = [tag for tag, commit in index.items() if tags.get(tag) != commit]
    for tag in wrong:
        client.tag(tag, index[tag])
    return wrong


def _index(versions: list[Version]) -> Mapping[str, str]:
    return {f"v{version.manifest.version}": version.commit for version in reversed(versions)}


def _file_problems(version: Version, read: set[str]) -> Iterator[Problem]:
    for entry in version.manifest.files:
        if entry.sha256 in read:
            continue
        try:
            version.read(entry.path)
            read.add(entry.sha256)
        except IntegrityError as error:
            yield Problem(str(version), entry.path, str(error))
