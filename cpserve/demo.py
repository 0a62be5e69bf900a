"""The whole story on the built-in base: teach three concepts, draw, recognise, export, draw again, and tell it on one page."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from cpserve.adapter import Adapter
from cpserve.base import load_base
from cpserve.concept import Concept, read_concept
from cpserve.drawing import Drawing, Drawn, generate
from cpserve.engine import Engine, open_engine
from cpserve.engines.eager import EagerEngine
from cpserve.errors import CpserveError
from cpserve.learning import Report, head_adapter, learn
from cpserve.png import png
from cpserve.prompts import Prompt
from cpserve.recognition import NONE, Answer, Judging, classify

if TYPE_CHECKING:
    from adapter_store import Store
    from trainer import Settings

_HEAD = """<!doctype html><meta charset=utf-8><title>cpserve demo</title><style>
body{font:15px sans-serif;max-width:70em;margin:2em auto}
figure{display:inline-block;margin:4px;text-align:center;font-size:12px}
img{width:96px;image-rendering:pixelated}</style>"""
EACH = 6


@dataclass(frozen=True)
class Told:
    """What the demo measured: the last line of its output.

    `dc_accuracy` is of `classify` among the concepts; `taken_for_none` counts what "none of these" would take of them.
    """

    concepts: int
    dc_accuracy: float
    dc_pictures: int
    taken_for_none: int
    largest_pixel_difference: float
    seconds: float
    report: str

    def json(self) -> str:
        return json.dumps(asdict(self))


def run_demo(
    examples: Path,
    store: Store,
    out: Path,
    settings: Settings,
    say: Callable[[str], None],
    progress: Report | None = None,
) -> Told:
    """Run it all; `examples` holds `<name>.zip` to teach from and the folders `unseen/<name>` of pictures to judge by. What
    `store` holds of a run with the same pictures and steps that was stopped is gone on with.

    Raises:
        CpserveError: there are no examples, or a step fails.
    """
    from export.build import export_onnx

    began = time.monotonic()
    zips = sorted(examples.glob("*.zip"), key=lambda path: (path.stem != "rocket", path.stem))
    if not zips:
        raise CpserveError(
            f"there are no example zips in {examples}", hint="run it in a checkout, or name a folder: --examples DIR"
        )
    concepts = [read_concept(path) for path in zips]
    kept_aside = [read_concept(examples / "unseen" / path.stem) for path in zips]
    base, name = load_base(), _name(concepts, settings)
    before = [c.name for c in head_adapter(store, name, base, settings.method).manifest.concepts]
    say(f"teaching {', '.join(c.name for c in concepts)} to {name}")
    say(f"  learned before, in {store.root}: {', '.join(before)}" if before else f"  kept in {store.root}")
    for version in learn(base, concepts, store, name, settings, resume=True, progress=progress, warn=say):
        say(f"  {version}  learned {version.manifest.concepts[-1].name}")
    adapter = head_adapter(store, name, base, settings.method)
    with EagerEngine(base) as engine:
        say("drawing every concept")
        drawn = _draw(engine, adapter)
        say("recognising pictures never seen")
        unseen = [(concept.name, picture.image) for concept in kept_aside for picture in concept.pictures]
        pictures = [image for _, image in unseen]
        answers = classify(engine, pictures, adapter)
        among = classify(engine, pictures, adapter, Judging(none=False))
    say("exporting to ONNX and drawing again from the bundle")
    bundle = export_onnx(base, out / "bundle")
    with open_engine(engine="onnx", bundle=bundle.root) as engine:
        again = _draw(engine, adapter)
    right = [answer.label == name for answer, (name, _) in zip(among, unseen, strict=True)]
    told = Told(
        concepts=len(concepts),
        dc_accuracy=round(float(np.mean(right)), 4),
        dc_pictures=len(right),
        taken_for_none=sum(answer.label == NONE for answer in answers),
        largest_pixel_difference=_difference(drawn, again),
        seconds=round(time.monotonic() - began, 1),
        report=str(out / "report.html"),
    )
    taught = {concept.name: [p.image for p in concept.pictures] for concept in concepts}
    _story(taught, drawn).save(out / "story.png")
    (out / "report.html").write_text(
        _page(told, taught, drawn, again, list(zip(unseen, answers, strict=True))), encoding="utf-8"
    )
    return told


def _name(concepts: Sequence[Concept], settings: Settings) -> str:
    """The adapter's: other pictures or steps are taught to another one."""
    from trainer.images import digest

    taught = "".join(concept.name + digest(concept) for concept in concepts)
    return f"demo-{settings.steps}-steps-{hashlib.sha256(taught.encode()).hexdigest()[:8]}"


def _draw(engine: Engine, adapter: Adapter) -> list[Drawn]:
    prompts = [Prompt(f"a photo of {c.token}", adapter) for c in adapter.manifest.concepts for _ in range(EACH)]
    seeds = [seed for _ in adapter.manifest.concepts for seed in range(EACH)]
    return generate(engine, prompts, seeds, Drawing(guidance=3.0))


def _difference(first: Sequence[Drawn], second: Sequence[Drawn]) -> float:
    """The largest difference of a pixel between two drawings of the same, in 0..255."""
    return max(
        float(np.abs(np.asarray(a.image, dtype=int) - np.asarray(b.image, dtype=int)).max())
        for a, b in zip(first, second, strict=True)
    )


def _story(taught: dict[str, list[Image.Image]], drawn: list[Drawn]) -> Image.Image:
    """A row a concept: four of the pictures that it was taught from, then what was drawn."""
    side, gap = 96, 6
    page = Image.new("RGB", ((4 + EACH) * (side + gap) + 3 * gap, len(taught) * (side + gap)), "white")
    for y, (name, images) in enumerate(taught.items()):
        made = [d.image for d in drawn if f"<{name}>" in d.prompt]
        for x, image in enumerate([*images[:4], *made]):
            left = x * (side + gap) + (3 * gap if x >= 4 else 0)
            page.paste(image.resize((side, side), Image.Resampling.LANCZOS), (left, y * (side + gap)))
    return page


def _page(
    told: Told,
    taught: dict[str, list[Image.Image]],
    drawn: list[Drawn],
    again: list[Drawn],
    judged: list[tuple[tuple[str, Image.Image], Answer]],
) -> str:
    rows = []
    for prompt in dict.fromkeys(d.prompt for d in drawn):
        pictures = [(d.image, f"seed {d.seed}") for d in drawn if d.prompt == prompt]
        compiled = [(d.image, "from the bundle") for d in again if d.prompt == prompt]
        rows.append(f"<h3>{html.escape(prompt)}</h3>{_strip(pictures)}{_strip(compiled)}")
    photos = "".join(f"<h3>{html.escape(n)}</h3>{_strip([(i, n) for i in images])}" for n, images in taught.items())
    marks = [("✓" if answer.label == name else "✗", image, answer) for (name, image), answer in judged]
    answers = [(image, f"{mark} {answer.label} {answer.probability:.2f}") for mark, image, answer in marks]
    figures = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in asdict(told).items()
    )
    return (
        f"{_HEAD}<h1>cpserve: the story on the built-in base</h1><table>{figures}</table>"
        f"<h2>Taught from these pictures, one concept after another</h2>{photos}"
        f"<h2>Drawn by the last version: by torch, then from the ONNX bundle</h2>{''.join(rows)}"
        f"<h2>Pictures never seen, as the diffusion classifier labels them</h2>{_strip(answers)}"
    )


def _strip(pictures: Sequence[tuple[Image.Image, str]]) -> str:
    return "<div>" + "".join(_figure(image, words) for image, words in pictures) + "</div>"


def _figure(image: Image.Image, words: str) -> str:
    shown = image.resize((96, 96), Image.Resampling.NEAREST if image.width < 96 else Image.Resampling.LANCZOS)
    data = base64.b64encode(png(shown)).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt=""><figcaption>{html.escape(words)}</figcaption></figure>'
    )
