"""References to adapter versions, as a user types them: `name`, `name@v3`, `name@prod`, `hf://user/repo@v3`.

Knows their grammar. Does not know which names, versions or aliases exist.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from cpserve.errors import RefError
from cpserve.manifest import NAME_PATTERN, check_name

LATEST = "latest"

_HUB = "hf://"
VERSION = re.compile(r"v([1-9][0-9]{0,8})")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
# A version number however written, `latest`, the Hub's branch, or what a commit's hash could begin with.
_RESERVED = re.compile(r"v[0-9]+|latest|main|[0-9a-f]+")
_REPO_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"(?!.*(?:--|\.\.)){_REPO_PART}/{_REPO_PART}(?<!\.git)")


@dataclass(frozen=True)
class Ref:
    """One adapter version by name. `name` is a local name, or `user/repo` on the Hub; `at` picks the version.

    `at` is None or `latest` for the newest, `vN`, an alias, or (Hub only) 7 to 40 hex digits of a commit.

    Raises:
        RefError: a part is malformed, or an alias is a reserved word.
    """

    name: str
    at: str | None = None
    hub: bool = False

    def __post_init__(self) -> None:
        if not self.hub:
            check_name(self.name)
        elif len(self.name) > 96 or not _REPO.fullmatch(self.name):
            raise RefError(
                f"{self.name!r} is not a repository on the Hub", ref=str(self), hint=f"write {_HUB}user/repo"
            )
        if self.hub and self.at == "main":
            raise RefError(
                f"{self} names the branch", ref=str(self), hint=f"{_HUB}{self.name} alone is its newest version"
            )
        if self.at is not None and not (self.at == LATEST or self.version or self.commit):
            check_alias(self.at)

    def __str__(self) -> str:
        return f"{_HUB if self.hub else ''}{self.name}{'' if self.at is None else '@' + self.at}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a reference; `str()` gives the same text back.

        Raises:
            RefError: it is malformed.
        """
        name, separator, at = text.removeprefix(_HUB).partition("@")
        return cls(name, at if separator else None, hub=text.startswith(_HUB))

    def beside(self, repo: str) -> Self:
        """The same of another repository of the same user.

        Raises:
            RefError: that is no name of a repository.
        """
        return replace(self, name=f"{self.name.partition('/')[0]}/{repo}")

    @property
    def local_name(self) -> str:
        """What it is called here where nobody says otherwise."""
        return self.name.rpartition("/")[2].lower()[:64]

    @property
    def version(self) -> int | None:
        """N of `vN`, 1 or more."""
        match = VERSION.fullmatch(self.at or "")
        return int(match[1]) if match else None

    @property
    def commit(self) -> str | None:
        """The commit's hash, or its beginning; local versions have none."""
        return self.at if self.hub and self.at and _COMMIT.fullmatch(self.at) else None

    @property
    def alias(self) -> str | None:
        """The moving name to look up; None where `at` names the newest, a version or a commit."""
        return None if self.at == LATEST or self.version or self.commit else self.at


def check_alias(alias: str) -> str:
    """The alias itself, if it may be one.

    Raises:
        RefError: it is `latest`, reads as a version or a commit (`v3`, `beef`), or is no name at all.
    """
    if not re.fullmatch(NAME_PATTERN, alias) or _RESERVED.fullmatch(alias):
        raise RefError(
            f"{alias!r} cannot be an alias",
            ref=alias,
            hint="use a name such as 'prod'; 'latest', 'main', 'v' with a number, and hex digits alone are reserved",
        )
    return alias


def no_alias(adapter: str, alias: str, known: Sequence[str]) -> RefError:
    """That an adapter has no such alias, and which it has."""
    return RefError(
        f"{adapter} has no alias {alias!r}", ref=f"{adapter}@{alias}", hint=f"it has {', '.join([LATEST, *known])}"
    )
