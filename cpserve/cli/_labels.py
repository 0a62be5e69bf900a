"""The table of `classify --out`: rows are written as pictures are judged, so that a stopped run goes on."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpserve.cli._border import write, writing
from cpserve.errors import CpserveError

if TYPE_CHECKING:
    from cpserve.recognition import Answer, Judging

Labelled = list[tuple[str, "Answer"]]
# the probability of every label follows
FIXED = ("picture", "adapter", "draws", "error", "label", "evaluations", "seconds")


@dataclass(frozen=True)
class LabelTable:
    """A CSV file of what one version of an adapter said of pictures, all judged alike."""

    path: Path
    adapter: str
    judging: Judging
    labels: tuple[str, ...]

    @property
    def maker(self) -> tuple[str, str, str]:
        """What every row says of how it was made."""
        return self.adapter, str(self.judging.draws), str(self.judging.error)

    def begin(self, *, resume: bool) -> Labelled:
        """What a stopped run had judged; the table is left with whole rows only.

        Raises:
            CpserveError: there is a table and it is not to be gone on with, or it was made with another
                adapter or judged otherwise; or the disk refuses.
        """
        if self.path.exists() and not resume:
            hint = "go on with it: --resume; or choose another --out"
            raise CpserveError(f"{self.path} is there already", hint=hint)
        judged = self._judged() if self.path.exists() else []
        write(self.path, _lines([(*FIXED, *self.labels)]) + self._rows(judged))
        return judged

    def append(self, labelled: Labelled) -> None:
        """Add rows, which outlive this process from now on.

        Raises:
            CpserveError: the disk refuses.
        """
        with writing(self.path), self.path.open("ab") as file:
            file.write(self._rows(labelled))

    def _rows(self, labelled: Labelled) -> bytes:
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
                for where, a in labelled
            ]
        )

    def _judged(self) -> Labelled:
        text = self.path.read_bytes().decode("utf-8", "surrogateescape")
        whole = text[: text.rfind("\n") + 1]  # a killed run's last row may be cut short
        try:
            head, *rows = csv.reader(io.StringIO(whole, newline=""))
            makers = {tuple(row[1:4]) for row in rows}
            answers = [(row[0], self._answer(row)) for row in rows]
        except (ValueError, KeyError, IndexError, csv.Error):
            head, makers = [], set()
        if tuple(head) != (*FIXED, *self.labels) or makers - {self.maker}:
            adapter, draws, error = self.maker
            raise CpserveError(
                f"{self.path} is no table of what {adapter} said of pictures in {draws} draws at an error of {error}",
                hint="choose another --out, or the --adapter, --draws and --error (or the cpserve) that it was made with",
            )
        return answers

    def _answer(self, row: Sequence[str]) -> Answer:
        from cpserve.recognition import Answer

        _, _, _, _, label, spent, seconds, *chances = row
        p = dict(zip(self.labels, map(float, chances), strict=True))
        return Answer(label, p[label], p, int(spent), float(seconds))


def _lines(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")  # file names may be any bytes
