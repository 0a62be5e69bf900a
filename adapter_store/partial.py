"""The record of what stayed on the Hub when a version was pulled: a hash over the rest, where from, and the paths."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Left:
    """`origin` is the reference without a version, `endpoint` the Hub that it means (empty: not recorded), `paths` the files
    that are not here.
    """

    origin: str
    paths: tuple[str, ...]
    endpoint: str = ""

    def fetching(self, number: int, name: str, *, for_training: bool = True) -> str:
        """The command that brings the rest of version `number` of the adapter that is called `name` here."""
        where = f" --endpoint {self.endpoint}" if self.endpoint else ""
        whole = " --for-training" if for_training else ""
        return f"cpserve adapters pull {self.origin}@v{number} --as {name}{whole}{where}"

    def dump(self) -> bytes:
        body = "\n".join([f"{self.origin} {self.endpoint}".strip(), *self.paths]).encode()
        return hashlib.sha256(body).hexdigest().encode() + b"\n" + body

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a record.

        Raises:
            ValueError: it is damaged.
        """
        digest, _, body = data.partition(b"\n")
        if digest != hashlib.sha256(body).hexdigest().encode():
            raise ValueError("the record is damaged")
        where, *paths = body.decode().split("\n")
        origin, _, endpoint = where.partition(" ")
        return cls(origin, tuple(paths), endpoint)
