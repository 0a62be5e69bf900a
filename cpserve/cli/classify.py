"""`cpserve classify`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cpserve.cli._border import when_stopped, writing
from cpserve.cli._common import (
    Common,
    NumberRange,
    common_options,
    engine_options,
    examples,
    hub_options,
    open_for,
    read_adapter,
)
from cpserve.cli._labels import LabelTable, check_new
from cpserve.cli._show import emit, note, reporting, table

if TYPE_CHECKING:
    from cpserve.adapter import Adapter
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
@click.argument(
    "paths", nargs=-1, required=True, type=click.Path(readable=False, path_type=Path), metavar="IMAGE_OR_DIR..."
)
@click.option(
    "--adapter", "ref", required=True, metavar="REF", help="NAME, NAME@vN, NAME@ALIAS or hf://USER/REPO[@vN]."
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="CSV",
    help="Also write a table with the probability of every label, which grows as pictures are judged.",
)
@click.option(
    "--resume", is_flag=True, help="Go on with the table of a run that was stopped; it knows pictures by their paths."
)
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
@click.option(
    "--known-only",
    is_flag=True,
    help="Each picture shows one of the concepts; none of these is no answer.",
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
    known_only: bool,
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
    if explain and any(explain.resolve() in (place := path.resolve(), *place.parents) for path in paths):
        raise click.UsageError(f"--explain {explain} would write among the pictures: name a folder of its own")
    if out and not resume:
        check_new(out)  # sooner than the models are loaded
    from cpserve.cli._pictures import total

    refused: list[dict[str, str]] = []
    if explain:
        with writing(explain):
            explain.mkdir(parents=True, exist_ok=True)
    with open_for(common, engine, bundle, base, [ref]) as opened:
        version = common.store.version(ref)
        name, adapter = str(version), read_adapter(opened, version)
        judging = _judging(draws, error, none=not known_only)
        _warn(opened, adapter, judging)
        labels = _table(out, name, adapter, opened, judging)
        expected, done = total(paths), 0
        kept = f"{out} holds all that was judged; go on with --resume" if out else ""
        with _begun(labels, resume=resume) as answers, reporting() as report, when_stopped(kept):
            found = _pictures(paths, refused, labels, explain)
            while batch := dict(islice(found, AT_ONCE)):
                new = {where: picture for where, picture in batch.items() if where not in answers}
                answers.update(_judge(opened, adapter, judging, new, labels))
                if explain:
                    for where, picture in batch.items():
                        _explain(opened, adapter, judging, explain, where, picture, answers[where])
                done += len(batch)
                report("pictures", done, max(expected, done), "")
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
            for path, a in answers.items()
        ],
        "refused": refused,
    }
    rows = [(path, a.label, f"{a.probability:.3f}", a.evaluations, f"{a.seconds:.2f}") for path, a in answers.items()]
    head = ("picture", "label", "probability", "evaluations", "seconds")
    emit(value, table(head, rows), as_json=common.json)
    if refused:
        ctx.exit(1)


def _pictures(
    paths: Sequence[Path], refused: list[dict[str, str]], labels: LabelTable | None, explain: Path | None
) -> Iterator[tuple[str, Picture]]:
    """What is asked about; what this command itself writes into a folder that it reads is none of it."""
    from cpserve.cli import _pictures
    from cpserve.errors import ConceptError

    own = {path.resolve() for path in (labels and labels.path, labels and labels.lock, explain) if path}
    for path in paths:
        for where, found in _pictures.read(path):
            place = Path(where).resolve()
            if own & {place, *place.parents}:
                continue
            if isinstance(found, ConceptError):
                click.echo(f"refused: {found}", err=True)
                refused.append({"picture": where, "rule": found.rule, "hint": found.hint})
            else:
                yield where, found


def _judging(draws: int | None, error: float | None, *, none: bool) -> Judging:
    from cpserve.recognition import Judging

    usual = Judging()
    return replace(usual, draws=draws or usual.draws, error=usual.error if error is None else error, none=none)


def _warn(engine: Engine, adapter: Adapter, judging: Judging) -> None:
    """What costs more than it need, or was never measured."""
    from cpserve.base import BUILTIN
    from cpserve.recognition import MANY

    known, base = len(adapter.manifest.concepts), engine.spec.entry.id
    if judging.error and not engine.slopes and known > MANY * judging.kept:
        note(f"each of {known} concepts is asked; a bundle of cpserve export --slopes asks few")
    if base != BUILTIN:
        note(f"how sure answers are was fitted on {BUILTIN}; on {base} it is a guess")


def _how(engine: Engine) -> str:
    """What answers may depend on beside adapter and base."""
    return " ".join(filter(None, [engine.kind, engine.precision, "slopes" if engine.slopes else "", engine.merged]))


def _table(out: Path | None, name: str, adapter: Adapter, engine: Engine, judging: Judging) -> LabelTable | None:
    from cpserve.recognition import labels_of

    if not out:
        return None
    weights, labels = engine.spec.entry.fingerprint.weights, tuple(labels_of(adapter, judging))
    return LabelTable(Path(realpath(out)), name, adapter.content_hash[:12], weights[:12], _how(engine), judging, labels)


def _begun(labels: LabelTable | None, *, resume: bool) -> AbstractContextManager[dict[str, Answer]]:
    return labels.begun(resume=resume) if labels else nullcontext({})


def _judge(
    engine: Engine,
    adapter: Adapter,
    judging: Judging,
    new: Mapping[str, Picture],
    labels: LabelTable | None,
) -> dict[str, Answer]:
    """Label some pictures and write their rows."""
    from cpserve.recognition import classify as judge

    answers = dict(zip(new, judge(engine, [picture.image for picture in new.values()], adapter, judging), strict=True))
    if labels:
        labels.append(answers)
    return answers


def _explain(
    engine: Engine, adapter: Adapter, judging: Judging, folder: Path, where: str, picture: Picture, answer: Answer
) -> None:
    from cpserve.cli._pictures import save, saved
    from cpserve.explanation import difference, explained

    others = [label for label in answer.probabilities if label != answer.label]
    made_by = {
        "picture": where,
        "label": answer.label,
        "adapter": adapter.content_hash,
        "base": engine.spec.entry.fingerprint.weights,
        "engine": _how(engine),
        "judging": judging,
    }
    if others and not saved(folder, Path(where).stem, made_by):  # by a run that was stopped
        second = max(others, key=answer.probabilities.__getitem__)
        cells = difference(engine, picture.image, adapter, (answer.label, second), judging)
        save(explained(picture.image, answer, cells, second), folder, Path(where).stem, {**made_by, "second": second})
