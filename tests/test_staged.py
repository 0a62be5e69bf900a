"""Laws of the benchmarks' long work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.staged import staged


def test_those_who_share_a_folder_make_each_part_once(tmp_path: Path) -> None:
    """Two at work get all parts in order, and none was made twice."""
    made: list[int] = []

    def work(part: Sequence[int]) -> np.ndarray:
        made.extend(part)
        time.sleep(0.02)
        return np.array(part) * 10

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(staged, tmp_path / "both", range(25), 3, work) for _ in "ab"]
    assert sorted(made) == list(range(25))
    assert all(done.result()[0].tolist() == list(range(0, 250, 10)) for done in both)


def test_what_was_made_before_a_kill_is_not_made_again(tmp_path: Path) -> None:
    """Work that breaks off in its third part goes on with that part."""

    def breaking(part: Sequence[int]) -> np.ndarray:
        if part[0] == 4:
            raise KeyboardInterrupt
        return np.array(part)

    with pytest.raises(KeyboardInterrupt):
        staged(tmp_path, range(8), 2, breaking)
    assert staged(tmp_path, range(8), 2, lambda part: -np.array(part))[0].tolist() == [0, 1, 2, 3, -4, -5, -6, -7]
