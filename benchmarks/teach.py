"""How well is one concept taught? Each of N held-out concepts alone: seconds, and what the drawn pictures look like to a judge.

Physics: a K,V-only adapter moves what the UNet reads from the prompt and nothing else, so what the base cannot draw it
cannot be taught to draw. Judge: EfficientNet-Lite0, the features that `judge.py` chose on fitting concepts, nearest class
mean (cosine, common mean removed), a class being pictures of a drawing in other scenes as the base's autoencoder renders
them. Classes: the frozen list of 20 held-out concepts, and, in three styles, the things that the base was trained on and
that look most like one of them: without these a pizza counts as a cheese wedge, for no other class is round and yellow.
`right_of_20` is the judgement without them. Beside it, what the base draws untaught, with its best prompt for the concept:
a name, a description or a lookalike in three wordings, the one with most right of 8 pictures, drawn again with other seeds.

    python tools/emoji64/sources.py && python tools/emoji64/render.py      # the drawings, once
    python benchmarks/teach.py [--concepts 10] [--sheet FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "emoji64"))
import cpserve
from benchmarks.lite0 import JUDGE, lite0_layout
from benchmarks.timing import keep
from cpserve.adapter import Adapter, empty_adapter
from cpserve.base import BaseModel
from cpserve.concept import Concept, Picture
from cpserve.engines.eager import EagerEngine
from cpserve.evaluation import rendered
from examples import TAUGHT_PLACES, UNSEEN_PLACES, drawing_of, photo
from trainer import Record, Settings, learn

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


def class_means(base: BaseModel) -> tuple[np.ndarray, np.ndarray]:
    """Means `[C, F]`, first of the 20 concepts and then of each lookalike in each style, and the concepts' pictures
    themselves `[20, OTHERS, F]`.
    """
    near = sorted({name for names in LOOKALIKES for name in names})
    classes = [*FROZEN, *(name for name in near for _ in STYLES)]
    with EagerEngine(base) as engine:
        seen = rendered(engine, [i for n, name in enumerate(classes) for i in pictures(name, n)[1]])
    features = judged(seen).reshape(len(classes), OTHERS, -1)
    return features.mean(1), features[: len(FROZEN)]


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


def untaught(
    base: BaseModel, number: int, means: np.ndarray, guidance: float
) -> tuple[dict[str, object], list[Image.Image]]:
    """What the base's best prompt is worth, and its pictures."""
    style, phrases = STYLES[number % len(STYLES)], (FROZEN[number], DESCRIPTIONS[number], *LOOKALIKES[number])
    tried = {}
    for prompt in (w.format(phrase, style=style) for phrase in phrases for w in WORDINGS):
        seen = judged(draw(base, prompt, None, guidance, range(DRAWN, DRAWN + TRIED)))
        tried[prompt] = shares(seen, means, number), shares(seen, means[: len(FROZEN)], number)
    best = max(tried, key=lambda prompt: tried[prompt])
    images = draw(base, best, None, guidance)
    row = scored("base", judged(images), means, number)
    return {"best_prompt": best, **row, "base_any_of_20": max(tried.values(), key=lambda t: t[1])[1]}, images


def scored(what: str, features: np.ndarray, means: np.ndarray, own: int) -> dict[str, float]:
    """The share that is right among all classes, and among the 20 alone."""
    return {what: shares(features, means, own), f"{what}_of_20": shares(features, means[: len(FROZEN)], own)}


def judged(images: Sequence[Image.Image]) -> np.ndarray:
    return lite0_layout(images, *JUDGE)


def shares(features: np.ndarray, means: np.ndarray, own: int) -> float:
    centre = means.mean(0)
    unit = (means - centre) / np.linalg.norm(means - centre, axis=1, keepdims=True)
    return float(np.mean(((features - centre) @ unit.T).argmax(1) == own))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--base", default="builtin:emoji64")
    arguments.add_argument("--concepts", type=int, default=10)
    arguments.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the trainer")
    arguments.add_argument("--guidance", type=float, default=3.0)
    arguments.add_argument("--untaught", action="store_true", help="only what the base draws")
    arguments.add_argument("--sheet", type=Path)
    arguments.add_argument("--work", type=Path, default=Path("build/teach"))
    asked = arguments.parse_args()
    settings = Settings.of({k: json.loads(v) if v[0].isdigit() else v for k, v in (s.split("=") for s in asked.set)})
    base = cpserve.load_base(asked.base)
    means, others = class_means(base)
    rows, strips = [], []
    for i in range(asked.concepts):
        row, plain = untaught(base, i, means, asked.guidance)
        row |= {"concept": FROZEN[i], **scored("real", others[i], means, i)}
        taught, drawn = pictures(FROZEN[i], i)[0], []
        if not asked.untaught:
            adapter, seconds = teach(base, taught, settings, asked.work)
            drawn = draw(base, "a photo of <thing>", adapter, asked.guidance)
            row |= {"seconds": round(seconds, 1), **scored("right", judged(drawn), means, i)}
        rows.append(row)
        strips.append([*taught[:3], *drawn[:12], *plain[:3]])
        print(rows[-1], flush=True)
    if asked.sheet:
        sheet = Image.new("RGB", (18 * 66, len(strips) * 66), "white")
        for y, strip in enumerate(strips):
            for x, image in enumerate(strip):
                sheet.paste(image.resize((64, 64)), (x * 66, y * 66))
        sheet.save(asked.sheet)
    mean = {k: round(float(np.mean([r[k] for r in rows])), 3) for k, v in rows[0].items() if isinstance(v, float)}
    keep("teach", {
        "weights": base.spec.entry.fingerprint.weights[:12], "judge": JUDGE, "guidance": asked.guidance, "concepts": len(rows),
        **settings.dump(), **mean, "by_concept": {row.pop("concept"): row for row in rows},
    })  # fmt: skip


if __name__ == "__main__":
    main()
