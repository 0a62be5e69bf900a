"""The table of `classify --out`: rows are written as pictures are judged, so that a stopped run goes on."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpserve.cli._border import write, writing
from cpserve.errors import CpserveError

if TYPE_CHECKING:
    from cpserve.recognition import Answer, Judging

# the probability of every label follows
FIXED = ("picture", "adapter", "content", "base", "engine", "draws", "error", "label", "evaluations", "seconds")


def check_new(path: Path) -> None:
    """Raises: CpserveError: there is a table already."""
    if path.exists():
        raise CpserveError(f"{path} is there already", hint="go on with it: --resume; or choose another --out")


@dataclass(frozen=True)
class LabelTable:
    """A CSV file of what one version of an adapter on one base said of pictures, all judged alike.

    A version's number may be given again in another store: `content` and `base` are hashes of the weights.
    """

    path: Path
    adapter: str
    content: str
    base: str
    engine: str
    judging: Judging
    labels: tuple[str, ...]

    @property
    def maker(self) -> tuple[str, ...]:
        """What every row says of how it was made."""
        return self.adapter, self.content, self.base, self.engine, str(self.judging.draws), str(self.judging.error)

    @contextmanager
    def begun(self, *, resume: bool) -> Iterator[dict[str, Answer]]:
        """What a stopped run had judged, by picture; the table is left with whole rows only, and this process's alone.

        Raises:
            CpserveError: there is a table and it is not to be gone on with, it was made with another adapter or judged
                otherwise, or another process writes it; or the disk refuses.
        """
        with self._alone():
            with writing(self.path):
                judged = self._judged() if resume and self.path.exists() else {}
            if not resume:
                check_new(self.path)
            write(self.path, _lines([(*FIXED, *self.labels)]) + self._rows(judged))
            yield judged

    @contextmanager
    def _alone(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock = FileLock(self.lock, blocking=False)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                hint = "wait for it to end, or choose another --out"
                raise CpserveError(f"another process writes {self.path}", hint=hint) from None
        try:
            yield
        finally:
            self.lock.unlink(missing_ok=True)
            lock.release()

    @property
    def lock(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    def append(self, labelled: Mapping[str, Answer]) -> None:
        """Add rows, which outlive this process from now on.

        Raises:
            CpserveError: the disk refuses.
        """
        with writing(self.path), self.path.open("ab") as file:
            file.write(self._rows(labelled))

    def _rows(self, labelled: Mapping[str, Answer]) -> bytes:
        return _lines(
            [
                (
                    where,
                    *self.maker,
                    a.label,
                    a.evaluations,
                    f"{a.seconds:.3f}",
                    *(f"{a.probabilities[label]:.6f}" for label in self.labels),
                )
                for where, a in labelled.items()
            ]
        )

    def _judged(self) -> dict[str, Answer]:
        text = self.path.read_bytes().decode("utf-8", "surrogateescape")
        whole = text[: text.rfind("\n") + 1]  # a killed run's last row may be cut short
        try:
            head, *rows = csv.reader(io.StringIO(whole, newline=""))
            makers = {tuple(row[1 : FIXED.index("label")]) for row in rows}
            answers = {row[0]: self._answer(row) for row in rows}
        except (ValueError, KeyError, IndexError, csv.Error):
            head, makers = [], set()
        if tuple(head) != (*FIXED, *self.labels) or makers - {self.maker}:
            adapter, content, base, engine, draws, error = self.maker
            raise CpserveError(
                f"{self.path} is no table of what {adapter} ({content}, on {base}, {engine}) said of pictures in {draws} "
                f"draws at an error of {error} among {len(self.labels)} labels",
                hint="choose another --out, or the options (or the cpserve) that it was made with; its rows name them",
            )
        return answers

    def _answer(self, row: Sequence[str]) -> Answer:
        from cpserve.recognition import Answer

        label, spent, seconds, *chances = row[FIXED.index("label") :]
        p = dict(zip(self.labels, map(float, chances), strict=True))
        return Answer(label, p[label], p, int(spent), float(seconds))


def _lines(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")  # file names may be any bytes
