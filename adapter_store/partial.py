"""The record of what stayed on the Hub when a version was pulled: a hash over the rest, where from, and the paths."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Left:
    """`origin` is the reference without a version, `paths` the files that are not here."""

    origin: str
    paths: tuple[str, ...]

    def dump(self) -> bytes:
        body = "\n".join([self.origin, *self.paths]).encode()
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
        origin, *paths = body.decode().split("\n")
        return cls(origin, tuple(paths))
