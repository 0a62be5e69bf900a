"""`cpserve eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpserve.cli._border import write, writing
from cpserve.cli._common import Common, common_options, engine_options, examples, hub_options, open_for, read_adapter
from cpserve.cli._show import emit, reporting, table

if TYPE_CHECKING:
    from PIL import Image

    from adapter_store import Version
    from cpserve.evaluation import Evaluation, Matrix


@click.command(
    name="eval",
    epilog=examples(
        "cpserve eval pets",
        "cpserve eval pets --pictures unseen/ --out pets-evaluation --json",
        "cpserve eval hf://user/my-pets",
    ),
)
@click.argument("ref", metavar="REF")
@click.option(
    "--pictures",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="A folder for each concept, or a zip, with pictures of it that it was not learned from.",
)
@click.option(
    "--each", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="Pictures of each wording."
)
@click.option(
    "--steps", type=click.IntRange(1, 1000), default=20, show_default=True, metavar="N", help="Denoising steps."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("evaluation"),
    show_default=True,
    metavar="DIR",
    help="Where the measures and the pictures go.",
)
@engine_options
@hub_options
@common_options
def eval_(
    common: Common,
    ref: str,
    pictures: Path | None,
    each: int,
    steps: int,
    out: Path,
    engine: str,
    bundle: Path | None,
    base: str | None,
) -> None:
    """Measure what is left of each concept after every later one.

    The version in which each concept was learned draws all that it knows, from the same seeds. `kept` says how alike a
    concept's pictures are to those from when it was learned; with --pictures, also how near to the real ones. The
    diffusion classifier says how many of these, or of those from when it was learned, still show it. Writes
    evaluation.json and versions.png: a row a concept, a column a version, and below each picture how much is kept, or
    how near it is where --pictures has real ones of every concept.
    """
    _make_room(out)
    with open_for(common, engine, bundle, base, [ref]) as opened:
        from cpserve.evaluation import evaluate
        from cpserve.features import encoder_for

        lineage = _lineage(common, ref)
        versions = [read_adapter(opened, version) for version in lineage]
        judge, encode = encoder_for(opened.spec.entry.id)
        real = _real(pictures, [c.name for c in versions[-1].manifest.concepts]) if pictures else {}
        with reporting() as report:
            made = evaluate(
                opened,
                versions,
                encode,
                real,
                each=each,
                steps=steps,
                progress=lambda done, all_: report("evaluating versions", done, all_, ""),
            )
    value = _value(made, judge, lineage[-1])
    _write(out, made, value, [version.manifest.version for version in lineage])
    emit(value, _text(made, value, out), as_json=common.json)


def _make_room(out: Path) -> None:
    """Make the folder, sooner than the pictures, if no other evaluation lies there."""
    from adapter_store.layout import MEASURED
    from cpserve.errors import CpserveError

    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if (out / MEASURED).exists():
            raise CpserveError(f"{out} holds an evaluation already", hint="choose another --out, or delete it")


def _lineage(common: Common, ref: str) -> list[Version]:
    """The versions in which the concepts of `ref` were learned, in order, the last being `ref` itself."""
    from cpserve.errors import AdapterError

    head = common.store.version(ref)
    concepts = head.manifest.concepts
    if not concepts:
        raise AdapterError(f"{head} knows no concept yet", hint="teach one: cpserve train --concept ZIP")
    versions = [common.store.version(f"{head.name}@v{c.since}") for c in concepts[:-1]] + [head]
    for j, version in enumerate(versions):
        if [c.name for c in version.manifest.concepts] != [c.name for c in concepts[: j + 1]]:
            raise AdapterError(f"{version} knows other concepts than {head} knew then", hint="evaluate another version")
    return versions


def _real(folder: Path, names: list[str]) -> dict[str, list[Image.Image]]:
    from cpserve.concept import read_concept
    from cpserve.errors import ConceptError

    found = {n: next((p for p in (folder / n, folder / f"{n}.zip") if p.exists()), None) for n in names}
    if not any(found.values()):
        hint = f"name them after the concepts: {names[0]}.zip, or a folder {names[0]}"
        raise ConceptError(f"{folder} holds pictures of none of {', '.join(names)}", hint=hint)
    return {n: [p.image for p in read_concept(path).pictures] for n, path in found.items() if path}


def _value(made: Evaluation, judge: str, version: Version) -> dict[str, Any]:
    return {
        "version": str(version),
        "manifest_sha256": version.pin.manifest_sha256,
        "base": version.manifest.base.id,
        "judge": judge,
        "concepts": list(made.concepts),
        **made.summary(),
        "kept_matrix": made.kept,
        "alignment_matrix": made.alignment,
        "dc_matrix": made.dc,
        "a_mmd_by_concept": {made.concepts[i]: far for i, far in made.a_mmd.items()},
        "f_mmd_by_concept": {made.concepts[i]: far for i, far in made.f_mmd.items()},
        "drift_by_version": made.drift,
    }


def _text(made: Evaluation, value: Mapping[str, Any], out: Path) -> str:
    last = len(made.concepts) - 1

    def cell(row: dict[int, float], i: int) -> str:
        return f"{row[i]:.3f}" if i in row else "-"

    rows = [
        (
            name,
            cell(made.kept[last], i),
            cell(made.alignment[i], i),
            cell(made.alignment[last], i),
            cell(made.dc[i], i),
            cell(made.dc[last], i),
        )
        for i, name in enumerate(made.concepts)
    ]
    apart = {"those of when they were learned": value["f_mmd"], "real ones": value["a_mmd"]}
    notes = [
        f"distance of pictures now to {what} (MMD with KID's kernel): {far:.3f}"
        for what, far in apart.items()
        if far is not None
    ]
    notes += [
        f"unrelated prompts drifted by {made.drift[-1]:.3f}; features: {value['judge']}",
        f"pictures, a row a concept and a column a version, with `{_drawn(made)[0]}` below each: {out / 'versions.png'}",
    ]
    head = ("concept", "kept", "alignment learned", "now", "dc accuracy learned", "now")
    return "\n".join([table(head, rows), "", *notes])


def _drawn(made: Evaluation) -> tuple[str, Matrix]:
    """What stands below the pictures, by version and concept: nearness to real pictures where every concept has some."""
    everyone = all(len(made.alignment[j]) == len(row) for j, row in made.kept.items())
    return ("alignment", made.alignment) if everyone else ("kept", made.kept)


def _write(out: Path, made: Evaluation, value: Mapping[str, Any], versions: Sequence[int]) -> None:
    import json

    from PIL import Image

    from adapter_store.layout import MEASURED
    from cpserve.cli import _pictures
    from cpserve.png import png

    n, (_, measured) = len(made.concepts), _drawn(made)
    blank = Image.new("RGB", made.pictures[0][0][0].size, "white")

    def cell(i: int, j: int) -> Image.Image:
        said = f"{measured[j][i]:.2f}" if i in measured[j] else ""
        return _pictures.captioned(made.pictures[j].get(i, [blank])[0], said)

    cells = [cell(i, j) for i in range(n) for j in range(n)]
    names = [f"v{number}" for number in versions]
    write(out / "versions.png", png(_pictures.labelled(_pictures.grid(cells, n), made.concepts, names)))
    write(out / MEASURED, f"{json.dumps(value, indent=1)}\n".encode())  # last: with it the evaluation counts as whole
