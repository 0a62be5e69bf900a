"""What the user sees: JSON or text on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from cpserve.errors import printable

if TYPE_CHECKING:
    from cpserve.learning import Report

LINE_S = 10.0  # between two lines of progress where there is no terminal


def emit(value: Any, text: str, *, as_json: bool) -> None:
    """Print the one or the other."""
    click.echo(json.dumps(value, indent=1) if as_json else "\n".join(map(printable, text.split("\n"))))


def note(text: str) -> None:
    """A remark that is no error."""
    click.echo(f"note: {printable(text)}", err=True)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Left-aligned columns under their names."""
    cells = [list(head), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def pairs(values: Mapping[str, Any], indent: int = 0) -> str:
    """One `name  value` a line."""
    width = max(map(len, values), default=0)
    lines = (f"{name.replace('_', ' ').ljust(width)}  {printable(value)}" for name, value in values.items())
    return "\n".join(" " * indent + line for line in lines)


@contextmanager
def reporting() -> Iterator[Report]:
    """Progress on stderr: a bar for each `what` on a terminal, elsewhere a line now and then."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    words = [TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[detail]")]
    columns = (words[0], BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), words[1])
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int, detail: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, detail="")
            bars.update(tasks[what], completed=done, total=total, detail=f"{detail} {peak_memory()}".strip())

        yield report


def _lines() -> Report:
    began: dict[str, tuple[int, float]] = {}
    last = time.monotonic()

    def report(what: str, done: int, total: int, detail: str) -> None:
        nonlocal last
        now = time.monotonic()
        first, start = began.setdefault(what, (done, now))
        if done < total and now - last < LINE_S:
            return
        last = now
        left = f"{(total - done) * (now - start) / (done - first):.0f} s left" if first < done < total else ""
        parts = [f"{what} {done}/{total}", detail, left, peak_memory()]
        click.echo(", ".join(filter(None, parts)), err=True)

    return report


def peak_memory() -> str:
    """The most memory that this process has held so far, in words; empty where the system does not say."""
    if sys.platform == "win32":
        return ""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mib = peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return f"{mib:,.0f} MiB"
