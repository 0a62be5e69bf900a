"""`cpserve classify`."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cpserve.cli._border import writing
from cpserve.cli._common import Common, common_options, engine_options, examples, hub_options, open_for, read_adapters
from cpserve.cli._show import emit, reporting, table

if TYPE_CHECKING:
    from cpserve.adapter import Adapter
    from cpserve.engine import Engine
    from cpserve.recognition import Answer
    from cpserve.unpack import Picture

AT_ONCE = 16  # pictures in memory

Labelled = list[tuple[str, "Answer"]]


@click.command(
    epilog=examples(
        "cpserve classify photo.jpg --adapter pets",
        "cpserve classify holiday/ more.zip --adapter pets@v2 --out labels.csv",
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
    help="Also write a table with the probability of every label.",
)
@click.option(
    "--draws",
    type=click.IntRange(1),
    metavar="N",
    help="At most so many draws for a picture and label: more are surer and slower.",
)
@click.option(
    "--error",
    type=click.FloatRange(0, 0.5),
    metavar="P",
    help="The rate at which a label may be ruled out by chance; 0 rules none out.  [default: 0.01]",
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
    refused: list[dict[str, str]] = []
    with open_for(common, engine, bundle, base) as opened:
        name, adapter = read_adapters(common, opened, [ref])[ref]
        labelled = _label(opened, adapter, _pictures(paths, refused), draws=draws, error=error)
    if out:
        _write(out, labelled)
    value = {
        "adapter": name,
        "pictures": [
            {"picture": path, "label": a.label, "probabilities": a.probabilities, "evaluations": a.evaluations}
            for path, a in labelled
        ],
        "refused": refused,
    }
    rows = [(path, a.label, f"{a.probability:.3f}") for path, a in labelled]
    emit(value, table(("picture", "label", "probability"), rows), as_json=common.json)
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


def _label(
    engine: Engine, adapter: Adapter, pictures: Iterator[tuple[str, Picture]], draws: int | None, error: float | None
) -> Labelled:
    from cpserve.recognition import Judging
    from cpserve.recognition import classify as judge

    usual = Judging()
    judging = Judging(draws=draws or usual.draws, error=usual.error if error is None else error)
    labelled: Labelled = []
    with reporting() as report:
        while batch := list(islice(pictures, AT_ONCE)):
            answers = judge(engine, [picture.image for _, picture in batch], adapter, judging)
            labelled += zip([where for where, _ in batch], answers, strict=True)
            report("pictures", len(labelled), len(labelled), "")
    return labelled


def _write(out: Path, labelled: Labelled) -> None:
    labels = list(labelled[0][1].probabilities) if labelled else []
    with writing(out), ExitStack() as stack:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet = csv.writer(stack.enter_context(out.open("w", newline="", encoding="utf-8", errors="surrogateescape")))
        sheet.writerow(["picture", "label", "evaluations", *labels])
        for where, answer in labelled:
            chances = [f"{answer.probabilities[label]:.6f}" for label in labels]
            sheet.writerow([where, answer.label, answer.evaluations, *chances])
