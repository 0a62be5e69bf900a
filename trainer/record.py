"""A run on disk: what is being learned, its latents, and the last state, so that a killed run goes on bit for bit.

The folder holds latents of the user's pictures and is deleted when the version is committed: pictures are not kept.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpserve.errors import TrainingError
from cpserve.manifest import ConceptEntry, Document, Fingerprint


class Run(Document, frozen=True):
    """What is being learned; a resumed run must ask for the same."""

    concept: ConceptEntry
    settings: dict[str, Any]
    base: Fingerprint
    start: str
    """The content hash of the adapter that learning went on from."""
    pictures: str
    """A hash of the pictures and captions: a resumed run must bring the same. It goes when the run goes, as they do."""

    def same_as(self, other: Run) -> bool:
        """Whether one may go on with the other; into how many parts a step is cut may change, where memory ran out."""
        mine, theirs = (replace(run, settings={**run.settings, "accumulate": 1}) for run in (self, other))
        return mine == theirs


@dataclass(frozen=True)
class Record:
    """The files of one run. All writes go to a neighbour first and are renamed into place."""

    folder: Path

    @property
    def run_file(self) -> Path:
        return self.folder / "run.json"

    def exists(self) -> bool:
        """Whether an unfinished run stands here."""
        return self.run_file.exists()

    def read_run(self) -> Run:
        """The unfinished run.

        Raises:
            TrainingError: there is none, or its file cannot be read.
        """
        try:
            return Run.read(self.run_file.read_bytes())
        except (OSError, ValueError) as error:
            raise self._unreadable() from error

    def begin(self, run: Run, latents: dict[str, Tensor]) -> None:
        """Lay down a new run: `latents` of the pictures and, with prior preservation, of the `prior`. `run.json` comes last, so
        a run that exists is complete.
        """
        self.delete()
        temporary = self.folder / "run.json.partial"
        with self._disk():
            self.folder.mkdir(parents=True)
            self._save(self.folder / "latents.safetensors", latents)
            with temporary.open("wb") as stream:
                stream.write(run.dump())
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self.run_file)

    def latents(self) -> dict[str, Tensor]:
        """The cached latents.

        Raises:
            TrainingError: they cannot be read.
        """
        return self._load("latents")

    def save_state(self, stage: str, tensors: dict[str, Tensor], step: int) -> None:
        """Keep a stage's state after `step` steps."""
        self._save(self.folder / f"{stage}.safetensors", {**tensors, "step": torch.tensor(step)})

    def load_state(self, stage: str) -> tuple[dict[str, Tensor], int]:
        """A stage's last state kept and its step; `({}, 0)` where none was.

        Raises:
            TrainingError: it cannot be read.
        """
        if not (self.folder / f"{stage}.safetensors").exists():
            return {}, 0
        tensors = self._load(stage)
        return tensors, int(tensors.pop("step"))

    def delete(self) -> None:
        """Remove the run: `run.json` first, so that a half-removed run is no run.

        Raises:
            TrainingError: something of it cannot be removed.
        """
        with self._disk():
            if self.folder.exists():
                self.run_file.unlink(missing_ok=True)
                shutil.rmtree(self.folder)

    def _load(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise self._unreadable() from error

    def _unreadable(self) -> TrainingError:
        return TrainingError(
            f"the unfinished run in {self.folder} cannot be read", hint="drop it: add --restart to the same command"
        )

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        partial = path.with_name(path.name + ".partial")
        with self._disk():
            try:
                save_file({k: t.detach().contiguous() for k, t in tensors.items()}, partial)
                with partial.open("rb") as written:
                    os.fsync(written.fileno())
                partial.replace(path)
            except (OSError, SafetensorError):
                partial.unlink(missing_ok=True)
                raise

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """What the disk refuses, as a sentence; the last state kept stays."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"the training state in {self.folder} cannot be changed: {getattr(error, 'strerror', None) or error}",
                hint="free some disk space, then run the same command with --resume",
                state=str(self.folder),
            ) from error
