"""`cpserve generate`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from cpserve.cli._show import emit, note, reporting

if TYPE_CHECKING:
    from PIL import Image

    from cpserve.adapter import Adapter
    from cpserve.drawing import Drawing
    from cpserve.engine import Engine

SAMPLERS = (
    "dpm",
    "ddim",
    "euler",
)  # cpserve.sample's, which would cost `--help` an import of torch; a test compares them
Named = tuple[str, "Adapter"]
AT_ONCE = 16  # pictures between two times that files are written; with guidance as many as one call of the UNet takes


@click.command(
    epilog=examples(
        'cpserve generate "a photo of <dog>" -n 8',
        'cpserve generate "a photo of <dog>" "a drawing of <dog>" --adapter pets@v2 --out pictures',
        'cpserve generate "a photo of <dog>" "a photo of <dog>" --adapter pets@v1 --adapter pets@v2 --bundle bundle',
    )
)
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option(
    "--adapter",
    "refs",
    multiple=True,
    metavar="REF",
    help="NAME, NAME@vN, NAME@ALIAS or hf://USER/REPO[@vN]: one for all prompts, or one for each, in order.  "
    "[default: default, if it exists]",
)
@click.option("--no-adapter", is_flag=True, help="The base model alone, also where there is an adapter called default.")
@click.option(
    "-n",
    "each",
    metavar="N",
    type=click.IntRange(1, 1000),
    default=4,
    show_default=True,
    help="Pictures of each prompt.",
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Seed of the first picture; each further one counts up.",
)
@click.option(
    "--steps", metavar="N", type=click.IntRange(1, 1000), default=20, show_default=True, help="Denoising steps."
)
@click.option(
    "--guidance",
    metavar="G",
    type=NumberRange(1, 100),
    default=3.0,
    show_default=True,
    help="How closely to follow the prompt; 1: no guidance.",
)
@click.option("--negative", default="", metavar="TEXT", help="What the pictures should not show.")
@click.option("--size", type=click.IntRange(8), metavar="PX", help="Side of the picture.  [default: the base's own]")
@click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    default="dpm",
    show_default=True,
    help="How noise is taken away, step by step.",
)
@engine_options
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out"),
    show_default=True,
    metavar="DIR",
    help="Where the pictures go.",
)
@hub_options
@common_options
def generate(
    common: Common,
    prompts: tuple[str, ...],
    refs: tuple[str, ...],
    no_adapter: bool,
    each: int,
    seed: int,
    engine: str,
    bundle: Path | None,
    base: str | None,
    out: Path,
    steps: int,
    guidance: float,
    negative: str,
    size: int | None,
    sampler: str,
) -> None:
    """Draw prompts, with seeds counting up.

    A picture depends on its prompt, adapter and seed, never on its neighbours. A file is only replaced by the same picture.
    """
    if refs and no_adapter:
        raise click.UsageError("--adapter and --no-adapter exclude each other")
    if not refs and not no_adapter and common.store.head("default"):
        refs = ("default",)
    if len(refs) not in {0, 1, len(prompts)}:
        raise click.UsageError(f"{len(prompts)} prompts go with one --adapter, or one for each, not {len(refs)}")
    with open_for(common, engine, bundle, base, refs) as opened:
        from cpserve.drawing import Drawing

        versions = {ref: common.store.version(ref) for ref in dict.fromkeys(refs)}
        read = {ref: (str(version), read_adapter(opened, version)) for ref, version in versions.items()}
        with writing(out):  # sooner than the drawing
            out.mkdir(parents=True, exist_ok=True)
        order = refs if len(refs) == len(prompts) else refs * len(prompts)
        named: list[Named | None] = [read[ref] for ref in order] or [None] * len(prompts)
        drawing = Drawing(steps=steps, guidance=guidance, negative=negative, size=size, sampler=sampler)
        made = _draw(opened, list(zip(prompts, named, strict=True)), range(seed, seed + each), drawing, out)
    files = [picture["file"] for picture in made["pictures"]]
    emit(made, "\n".join([*files, made["grid"]]), as_json=common.json)


def _draw(
    engine: Engine, jobs: list[tuple[str, Named | None]], seeds: range, drawing: Drawing, out: Path
) -> dict[str, Any]:
    """Draw and write; the files, and what each picture was made by."""
    from cpserve.cli import _pictures
    from cpserve.drawing import generate as draw
    from cpserve.prompts import Prompt

    for text, named in jobs:
        _warn(engine, text, named)
    written: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    every = [(text, named, seed) for text, named in jobs for seed in seeds]
    with reporting() as report, when_stopped(f"what was drawn lies in {out}"):
        for start in range(0, len(every), AT_ONCE):
            some = every[start : start + AT_ONCE]
            prompts = [Prompt(text, named[1] if named else None) for text, named, _ in some]

            def step(done: int, steps: int, start: int = start, count: int = len(some)) -> None:
                report("drawing", start * steps + done * count, len(every) * steps, "")

            drawn = draw(engine, prompts, [seed for *_, seed in some], drawing, step)
            for one, (text, named, seed) in zip(drawn, some, strict=True):
                settings = _made_by(engine, text, named, seed, drawing)
                file = _pictures.save(one.image, out, f"{_pictures.slug(text)}-{seed}", settings)
                written.append({"file": str(file), **settings})
                images.append(one.image)
    made_by = [{k: v for k, v in each.items() if k != "file"} for each in written]
    sheet = _pictures.save(_pictures.grid(images, len(seeds)), out, "grid", {"pictures": json.dumps(made_by)})
    return {"grid": str(sheet), "pictures": written}


def _made_by(
    engine: Engine, prompt: str, named: Named | None, seed: int, drawing: Drawing
) -> dict[str, str | int | float]:
    """All that a picture depends on."""
    entry = engine.spec.entry
    return {
        "prompt": prompt,
        "adapter": named[0] if named else "",
        "adapter_sha256": named[1].content_hash if named else "",
        "base": entry.id,
        "base_sha256": entry.fingerprint.weights,
        "seed": seed,
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "negative": drawing.negative,
        "size": drawing.size or engine.spec.pixels,
        "sampler": drawing.sampler,
        "engine": engine.kind,
        "precision": engine.precision,
        "merged": engine.merged,
    }


def _warn(engine: Engine, prompt: str, named: Named | None) -> None:
    """A token that nobody learned is drawn as its letters: most likely a typing error or the wrong adapter. What is too long
    is cut off.
    """
    from cpserve.prompts import left_out

    known = named[1].tokens if named else []
    if cut := left_out(engine.spec.tokenizer, prompt, known):
        note(f"the base reads {engine.spec.tokens} tokens of a prompt; left out is: {cut}")
    for token in re.findall(r"<[\w.-]+>", prompt):
        if token not in known:
            note(
                f"{named[0] if named else 'the base model'} has not learned {token}; it knows {', '.join(known) or 'none'}"
            )
