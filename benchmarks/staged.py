"""Long work in parts that outlives a kill, and that several processes may share."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock, Timeout

Item = TypeVar("Item")


def staged(
    folder: Path, items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """`work` on `size` items at a time, joined along the first axis, and the seconds of each item.

    Each part is written to `folder` as soon as it is made, and what lies there is not made again. Processes that are given the
    same `folder` share the parts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {start: folder / f"{start:05}.npz" for start in range(0, len(items), size)}
    done = sum(file.exists() for file in files.values())
    progress = Progress(folder.name.rpartition("-")[0], len(files), done)
    for wait in (False, True):  # what others have in hand comes last: it is theirs, unless they were killed
        for start in [start for start, file in files.items() if not file.exists()]:
            with suppress(Timeout), FileLock(folder / f"{start:05}.lock", blocking=wait):
                if not files[start].exists():
                    _make(files[start], items[start : start + size], work)
                progress.step()
    parts = []
    for path in files.values():
        with np.load(path) as file:
            parts.append((file["made"], file["seconds"]))
    made, seconds = (np.concatenate(part) for part in zip(*parts, strict=True))
    return made, seconds


def _make(file: Path, part: Sequence[Item], work: Callable[[Sequence[Item]], np.ndarray]) -> None:
    began = time.perf_counter()
    made = work(part)
    each = np.full(len(part), (time.perf_counter() - began) / len(part))
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez(stream, made=made, seconds=each)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


class Progress:
    """Lines such as `reference-0: 120/600, 4 h 10 min left`, at most one in `EVERY_S` seconds."""

    EVERY_S = 10.0

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self._had, self._began, self._told = done, time.monotonic(), -self.EVERY_S

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self._told < self.EVERY_S and self.done < self.total:
            return
        self._told = now
        left = int((now - self._began) / (self.done - self._had) * (self.total - self.done))
        words = f"{left // 3600} h {left // 60 % 60} min" if left >= 3600 else f"{left // 60} min {left % 60} s"
        print(f"{self.what}: {self.done}/{self.total}, {words} left", flush=True)


def once(file: Path, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Made once, then read from `file`."""
    if not file.exists():
        made = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(made))
        partial.replace(file)
    found: dict[str, float] = json.loads(file.read_text())
    return found
