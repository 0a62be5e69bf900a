"""How well is one concept taught? Each of N held-out concepts alone: seconds, and what the drawn pictures look like to a judge.

Physics: a K,V-only adapter moves what the UNet reads from the prompt and nothing else, so what the base cannot draw it
cannot be taught to draw. Judge: EfficientNet-Lite0, the nearest class, a class being pictures of one drawing in other scenes
as the base's autoencoder renders them. Classes: the frozen list of 20 held-out concepts, and in three styles the things that
the base was trained on and that look most like one of them: else a pizza counts as a cheese wedge, for no other class is
round and yellow. `judge.py` chose features and classes on other concepts. `of_20` is the judgement without lookalikes.
Beside it, what the base draws untaught, with its best prompt for the concept: a name, a description or a lookalike in three
wordings, the one with most right of 8 pictures, drawn again with other seeds.

Pictures are kept in `--work`: a killed run goes on, and another judge need not draw again.

    python tools/emoji64/sources.py && python tools/emoji64/render.py      # the drawings, once
    python benchmarks/teach.py [--concepts 10] [--sheet FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "emoji64"))
import cpserve
from benchmarks.lite0 import JUDGE, Classes, lite0_layout
from benchmarks.timing import keep
from cpserve.adapter import Adapter, empty_adapter
from cpserve.base import BaseModel
from cpserve.concept import Concept, Picture
from cpserve.engines.eager import EagerEngine
from cpserve.evaluation import rendered
from examples import TAUGHT_PLACES, UNSEEN_PLACES, drawing_of, photo
from trainer import Record, Settings, learn

ROOT = Path(__file__).parents[1]
FROZEN = (
    "baseball", "bed", "bicycle", "cheese wedge", "cookie", "crab", "drum", "fire engine", "jeans", "lizard", "lollipop",
    "monkey", "palm tree", "rabbit face", "red apple", "rose", "shrimp", "snowman without snow", "telescope", "tulip",
)  # fmt: skip
DESCRIPTIONS = (
    "white ball with red stitches", "bed with a pillow", "bicycle with two wheels", "yellow piece of cheese with holes",
    "chocolate chip cookie", "red crab with claws", "red drum with drumsticks", "red fire truck with a ladder",
    "blue trousers", "green lizard",
)  # fmt: skip
LOOKALIKES = (
    ("soccer ball", "volleyball", "ping pong"), ("couch and lamp", "seat", "bathtub"),
    ("kick scooter", "ferris wheel", "tractor"), ("pizza", "bread", "french fries"),
    ("doughnut", "pancakes", "chocolate bar"), ("scorpion", "squid", "turtle"), ("oil drum", "trumpet", "bathtub"),
    ("delivery truck", "bus", "ambulance"), ("t-shirt", "dress", "woman’s clothes"), ("turtle", "frog", "dragon"),
)  # fmt: skip
"""By number of the concept: how a person would describe it, and the nearest things that the base was trained on."""
WORDINGS = ("a picture of a {}", "a photo of a {}", "a {style} emoji of a {}")
STYLES = ("noto", "twitter", "joy")
TAUGHT, OTHERS, DRAWN, TRIED = 6, 12, 20, 8


def pictures(name: str, number: int) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures to teach from, and pictures of the same drawing in other scenes."""
    rgba, rng = drawing_of(name, STYLES[number % len(STYLES)]), np.random.default_rng((11, number))
    taught = [photo(rng, rgba, TAUGHT_PLACES[i % 3], (0, 10)) for i in range(TAUGHT)]
    others = [photo(rng, rgba, UNSEEN_PLACES[i % 3], (0, 15)) for i in range(OTHERS)]
    return [Image.open(io.BytesIO(b)).convert("RGB") for b in taught], [
        Image.open(io.BytesIO(b)).convert("RGB") for b in others
    ]


def kept(path: Path, make: Callable[[], list[Image.Image]]) -> list[Image.Image]:
    """Square pictures side by side in one file, made unless they are there."""
    if not path.exists():
        images = make()
        side = images[0].height
        strip = Image.new("RGB", (side * len(images), side))
        for i, image in enumerate(images):
            strip.paste(image, (i * side, 0))
        path.parent.mkdir(parents=True, exist_ok=True)
        strip.save(path)
    with Image.open(path) as strip:
        return [strip.crop((x, 0, x + strip.height, strip.height)) for x in range(0, strip.width, strip.height)]


def teach(base: BaseModel, images: list[Image.Image], settings: Settings, folder: Path) -> tuple[Adapter, float]:
    began = time.monotonic()
    record = Record(folder)
    concept = Concept("thing", tuple(Picture(f"{i}.jpg", image) for i, image in enumerate(images)))
    adapter = learn(base, concept, empty_adapter(base.spec.entry), settings, record)
    record.delete()
    return adapter, time.monotonic() - began


def draw(
    base: BaseModel, prompt: str, adapter: Adapter | None, guidance: float, seeds: Sequence[int] = range(DRAWN)
) -> list[Image.Image]:
    with EagerEngine(base) as engine:
        prompts = [cpserve.Prompt(prompt, adapter)] * len(seeds)
        return [d.image for d in cpserve.generate(engine, prompts, seeds, cpserve.Drawing(guidance=guidance))]


def taught(
    base: BaseModel, number: int, settings: Settings, guidance: float, folder: Path
) -> tuple[list[Image.Image], float]:
    """What the base draws after it was taught the concept, and the seconds that teaching took."""
    settled = json.dumps([settings.dump(), guidance], sort_keys=True).encode()
    path = folder / f"{FROZEN[number]}-{hashlib.sha256(settled).hexdigest()[:12]}.png"
    clock = path.with_suffix(".seconds")

    def make() -> list[Image.Image]:
        adapter, seconds = teach(base, pictures(FROZEN[number], number)[0], settings, folder / "run")
        clock.write_text(f"{seconds:.1f}")
        return draw(base, "a photo of <thing>", adapter, guidance)

    return kept(path, make), float(clock.read_text())


def untaught(
    base: BaseModel, number: int, classes: Classes, guidance: float, folder: Path
) -> tuple[str, list[Image.Image]]:
    """The base's best prompt for the concept, and its pictures."""
    style, phrases = STYLES[number % len(STYLES)], (FROZEN[number], DESCRIPTIONS[number], *LOOKALIKES[number])
    prompts = [wording.format(phrase, style=style) for phrase in phrases for wording in WORDINGS]

    def drawn(prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
        path = folder / f"{prompt}-{guidance:g}-{seeds[0]}.png"
        return kept(path, lambda: draw(base, prompt, None, guidance, seeds))

    def worth(prompt: str) -> float:
        return classes.right(judged(drawn(prompt, range(DRAWN, DRAWN + TRIED))), number)

    best = max(prompts, key=worth)
    return best, drawn(best, range(DRAWN))


def judged(images: Sequence[Image.Image]) -> np.ndarray:
    return lite0_layout(images, *JUDGE)


def scored(what: str, images: Sequence[Image.Image], classes: Classes, own: int) -> dict[str, float]:
    """The share that is right among all classes, and among the 20 alone."""
    features = judged(images)
    return {what: classes.right(features, own), f"{what}_of_20": classes.first(len(FROZEN)).right(features, own)}


def with_lookalikes(names: Sequence[str], lookalikes: Sequence[str]) -> list[Image.Image]:
    """OTHERS pictures of each class: the concepts, then each lookalike in three styles."""
    classes = [*names, *(name for name in sorted(set(lookalikes)) for _ in STYLES)]
    return [image for number, name in enumerate(classes) for image in pictures(name, number)[1]]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--base", default="builtin:emoji64")
    arguments.add_argument("--concepts", type=int, default=10)
    arguments.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the trainer")
    arguments.add_argument("--guidance", type=float, default=3.0)
    arguments.add_argument("--sheet", type=Path)
    arguments.add_argument("--work", type=Path, default=ROOT / "build" / "teach")
    asked = arguments.parse_args()
    settings = Settings.of({k: json.loads(v) if v[0].isdigit() else v for k, v in (s.split("=") for s in asked.set)})
    base = cpserve.load_base(asked.base)
    folder = asked.work / base.spec.entry.fingerprint.weights[:12]
    folder.mkdir(parents=True, exist_ok=True)
    with EagerEngine(base) as engine:
        seen = rendered(engine, with_lookalikes(FROZEN, [name for names in LOOKALIKES for name in names]))
    classes = Classes.of(judged(seen).reshape(len(seen) // OTHERS, OTHERS, -1))
    rows, strips = [], []
    for number in range(asked.concepts):
        best, plain = untaught(base, number, classes, asked.guidance, folder)
        drawn, seconds = taught(base, number, settings, asked.guidance, folder)
        row = {"concept": FROZEN[number], "seconds": seconds, **scored("right", drawn, classes, number)}
        row |= {"best_prompt": best, **scored("base", plain, classes, number)}
        row |= scored("real", seen[number * OTHERS : (number + 1) * OTHERS], classes, number)
        rows.append(row)
        strips.append([*pictures(FROZEN[number], number)[0][:3], *drawn[:12], *plain[:3]])
        print(row, flush=True)
    if asked.sheet:
        sheet = Image.new("RGB", (18 * 66, len(strips) * 66), "white")
        for y, strip in enumerate(strips):
            for x, image in enumerate(strip):
                sheet.paste(image.resize((64, 64)), (x * 66, y * 66))
        sheet.save(asked.sheet)
    mean = {k: round(float(np.mean([r[k] for r in rows])), 3) for k, v in rows[0].items() if isinstance(v, float)}
    keep("teach", {
        "weights": base.spec.entry.fingerprint.weights[:12], "judge": JUDGE, "guidance": asked.guidance,
        "concepts": len(rows), **settings.dump(), **mean, "by_concept": {row.pop("concept"): row for row in rows},
    })  # fmt: skip


if __name__ == "__main__":
    main()
