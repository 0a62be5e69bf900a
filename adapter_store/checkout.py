"""A version as an ordinary folder, which appears all at once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from adapter_store.atomic import disk_errors
from adapter_store.layout import MANIFEST, check_paths, is_training_only
from adapter_store.version import Version
from cpserve.errors import StoreError


def checkout(version: Version, folder: Path, *, for_training: bool) -> Path:
    """Write a version's files and its manifest into a folder that does not exist or is empty.

    Raises:
        IntegrityError: a file is damaged.
        StoreError: the folder is not empty, a file is not here, or the disk is full.
    """
    check_paths(version.paths())
    wanted = [path for path in version.paths() if for_training or not is_training_only(path)]
    if not folder.name or folder.is_mount():
        raise StoreError(f"{folder} cannot be replaced as a whole", hint=f"name a folder in it: {folder / 'adapter'}")
    with disk_errors("choose another folder"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreError(f"{folder} is not an empty folder", hint="choose a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.parent / f".{folder.name}.{os.urandom(8).hex()}"
        try:
            for path in wanted:
                _write(temporary / path, version.read(path))
            _write(temporary / MANIFEST, version.document)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
