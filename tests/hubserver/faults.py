"""What goes wrong on purpose: a fault waits for requests that it fits, and spoils as many as it is told to."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass
class Fault:
    """Spoils the next `times` requests whose method and path fit.

    `status` answers in place of the server; with `after` the request is carried out first and its answer lost.
    `body` changes the bytes of a file on their way out, `cut` drops the connection after so many, `stall_s` waits
    before each piece of `piece` bytes, `first` is done before the request is looked at.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    after: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Callable[[bytes], bytes] | None = None
    cut: int | None = None
    stall_s: float = 0.0
    piece: int = 1 << 16
    first: Callable[[], object] | None = None


class Faults:
    """The faults that are waiting."""

    def __init__(self) -> None:
        self._waiting: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, *faults: Fault) -> None:
        with self._lock:
            self._waiting += faults

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()

    def take(self, method: str, path: str) -> Fault | None:
        """The first that fits, used up by one."""
        with self._lock:
            for fault in self._waiting:
                if fault.method in {method, "*"} and re.search(fault.path, path):
                    fault.times -= 1
                    if not fault.times:
                        self._waiting.remove(fault)
                    return fault
        return None


def flipped(data: bytes) -> bytes:
    """The same length, one bit other."""
    return data[:-1] + bytes([data[-1] ^ 1])


def pieces(data: bytes, fault: Fault | None) -> Iterator[bytes]:
    size = fault.piece if fault else 1 << 20
    for at in range(0, len(data), size):
        yield data[at : at + size]
