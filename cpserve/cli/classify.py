"""`cpserve classify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cpserve.cli._border import when_stopped
from cpserve.cli._common import (
    Common,
    NumberRange,
    common_options,
    engine_options,
    examples,
    hub_options,
    open_for,
    read_adapters,
)
from cpserve.cli._labels import LabelTable
from cpserve.cli._show import emit, reporting, table

if TYPE_CHECKING:
    from cpserve.adapter import Adapter
    from cpserve.cli._labels import Labelled
    from cpserve.engine import Engine
    from cpserve.recognition import Answer, Judging
    from cpserve.unpack import Picture

AT_ONCE = 16  # pictures in memory


@click.command(
    epilog=examples(
        "cpserve classify photo.jpg --adapter pets",
        "cpserve classify holiday/ more.zip --adapter pets@v2 --out labels.csv",
        "cpserve classify holiday/ --adapter pets@v2 --out labels.csv --resume",
        "cpserve classify photo.jpg --adapter pets --explain why",
    )
)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE_OR_DIR...")
@click.option(
    "--adapter", "ref", required=True, metavar="REF", help="NAME, NAME@vN, NAME@ALIAS or hf://USER/REPO[@vN]."
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="CSV",
    help="Also write a table with the probability of every label, row by row.",
)
@click.option("--resume", is_flag=True, help="Go on with the table of a run that was stopped.")
@click.option(
    "--explain",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also write for each picture which parts speak for its label and which for the next likeliest.",
)
@click.option(
    "--draws",
    type=click.IntRange(2),
    metavar="N",
    help="At most so many draws for a picture and label: more are surer and slower.",
)
@click.option(
    "--error",
    type=NumberRange(0, 0.5),
    metavar="P",
    help="A label is ruled out at half this rate, an answer surer than 1 - P stands; 0: all draws.  [default: 0.02]",
)
@engine_options
@hub_options
@common_options
@click.pass_context
def classify(
    ctx: click.Context,
    common: Common,
    paths: tuple[Path, ...],
    ref: str,
    out: Path | None,
    resume: bool,
    explain: Path | None,
    draws: int | None,
    error: float | None,
    engine: str,
    bundle: Path | None,
    base: str | None,
) -> None:
    """Say which concept each picture shows.

    One of those that the adapter learned, or none of these, judged by nothing but the generator. What is no picture is
    refused and left out, and the exit code is then 1.
    """
    if resume and not out:
        raise click.UsageError("--resume goes with --out")
    from cpserve.cli._pictures import total

    refused: list[dict[str, str]] = []
    with open_for(common, engine, bundle, base) as opened:
        name, adapter = read_adapters(common, opened, [ref])[ref]
        judging = _judging(draws, error)
        labels = _table(out, name, adapter, judging)
        labelled = labels.begin(resume=resume) if labels else []
        known, expected = {where for where, _ in labelled}, total(paths)
        with reporting() as report:
            new = ((where, p) for where, p in _pictures(paths, refused) if where not in known)
            with when_stopped(f"{out} holds all that was judged; go on with --resume" if out else ""):
                while batch := list(islice(new, AT_ONCE)):
                    labelled += _judge(opened, adapter, judging, batch, labels, explain)
                    report("pictures", len(labelled), max(expected, len(labelled)), "")
    value = {
        "adapter": name,
        "pictures": [
            {
                "picture": path,
                "label": a.label,
                "probabilities": a.probabilities,
                "evaluations": a.evaluations,
                "seconds": a.seconds,
            }
            for path, a in labelled
        ],
        "refused": refused,
    }
    rows = [(path, a.label, f"{a.probability:.3f}", a.evaluations, f"{a.seconds:.2f}") for path, a in labelled]
    head = ("picture", "label", "probability", "evaluations", "seconds")
    emit(value, table(head, rows), as_json=common.json)
    if refused:
        ctx.exit(1)


def _pictures(paths: Sequence[Path], refused: list[dict[str, str]]) -> Iterator[tuple[str, Picture]]:
    from cpserve.cli import _pictures
    from cpserve.errors import ConceptError

    for path in paths:
        for where, found in _pictures.read(path):
            if isinstance(found, ConceptError):
                click.echo(f"refused: {found}", err=True)
                refused.append({"picture": where, "rule": found.rule, "hint": found.hint})
            else:
                yield where, found


def _judging(draws: int | None, error: float | None) -> Judging:
    from cpserve.recognition import Judging

    usual = Judging()
    return replace(usual, draws=draws or usual.draws, error=usual.error if error is None else error)


def _table(out: Path | None, name: str, adapter: Adapter, judging: Judging) -> LabelTable | None:
    from cpserve.recognition import labels_of

    return LabelTable(out, name, judging, tuple(labels_of(adapter, judging))) if out else None


def _judge(
    engine: Engine,
    adapter: Adapter,
    judging: Judging,
    batch: list[tuple[str, Picture]],
    labels: LabelTable | None,
    explain: Path | None,
) -> Labelled:
    """Label some pictures, write their rows, and explain them where that is asked for."""
    from cpserve.recognition import classify as judge

    answers = judge(engine, [picture.image for _, picture in batch], adapter, judging)
    labelled = [(where, answer) for (where, _), answer in zip(batch, answers, strict=True)]
    if explain:
        for (where, picture), answer in zip(batch, answers, strict=True):
            _explain(engine, adapter, judging, explain, where, picture, answer)
    if labels:
        labels.append(labelled)
    return labelled


def _explain(
    engine: Engine, adapter: Adapter, judging: Judging, folder: Path, where: str, picture: Picture, answer: Answer
) -> None:
    from cpserve.cli._pictures import save
    from cpserve.explanation import difference, explained

    others = {p: label for label, p in answer.probabilities.items() if label != answer.label}
    if others:
        second = others[max(others)]
        cells = difference(engine, picture.image, adapter, (answer.label, second), judging)
        said = {"picture": where, "label": answer.label, "second": second}
        save(explained(picture.image, answer, cells, second), folder, Path(where).stem, said)
