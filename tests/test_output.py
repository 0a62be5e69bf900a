"""Laws of what commands write: whole, or not at all."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cpserve.cli import _pictures
from cpserve.cli._border import write
from cpserve.errors import CpserveError
from cpserve.unpack import Picture

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes there")
LIMIT = 1000  # bytes


@pytest.fixture
def no_room() -> Iterator[None]:
    """The operating system refuses what goes beyond LIMIT bytes in a file, as a full disk would."""
    import resource

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_two_at_once_never_take_one_name(tmp_path: Path) -> None:
    """Of sixteen pictures saved beside each other under one name each is there, with what made it."""

    def save(seed: int) -> Path:
        return _pictures.save(Image.new("RGB", (256, 256)), tmp_path, "rocket", {"seed": seed})

    with ThreadPoolExecutor(16) as pool:
        paths = list(pool.map(save, range(16)))
    assert [Image.open(path).info["seed"] for path in paths] == [str(seed) for seed in range(16)]


def test_a_hidden_picture_that_is_named_is_read(tmp_path: Path) -> None:
    """In a folder it would be passed over."""
    path = tmp_path / ".photo.png"
    Image.new("RGB", (64, 64)).save(path)
    [(name, picture)] = _pictures.read(path)
    assert name == str(path)
    assert isinstance(picture, Picture)


@pytest.mark.usefixtures("no_room")
def test_no_half_files(tmp_path: Path) -> None:
    """What does not fit leaves nothing new, and what was there as it was."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    old = tmp_path / "old.csv"
    old.write_bytes(b"mine")
    with pytest.raises(CpserveError, match="cannot be written"):
        write(old, bytes(LIMIT + 1))
    with pytest.raises(CpserveError, match="cannot be written"):
        _pictures.save(noise, tmp_path, "rocket", {"seed": 0})
    assert [*tmp_path.iterdir()] == [old]
    assert old.read_bytes() == b"mine"


@pytest.mark.usefixtures("no_room")
def test_what_fits_is_written(tmp_path: Path) -> None:
    """Up to the last byte, with the folders in between."""
    write(tmp_path / "a" / "b", bytes(LIMIT))
    assert (tmp_path / "a" / "b").stat().st_size == LIMIT
