"""How well is one concept taught? Each of N held-out concepts alone: seconds, and what the drawn pictures look like to a judge.

Physics: a K,V-only adapter moves what the UNet reads from the prompt and nothing else, so what the base cannot draw it
cannot be taught to draw. Judge: EfficientNet-Lite0, the features that `judge.py` chose on fitting concepts, nearest class
mean (cosine, common mean removed) among the frozen list of 20 held-out concepts, a class being pictures of the concept's
own drawing in other scenes as the base's autoencoder renders them. Beside it, what the base draws without being taught:
`base` with its best prompt for the concept, a name or description in three wordings, the one with most right of 8
pictures, drawn again with other seeds; `nearest` likewise with the names of things that it was trained on and that look
most like it (a pizza for a cheese wedge), which says how far the judge can be fooled.

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
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "emoji64"))
import cpserve
from benchmarks.lite0 import JUDGE, lite0_layout
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
PHRASES = {
    "baseball": ("baseball", "white ball with red stitches", "soccer ball", "volleyball", "ping pong"),
    "bed": ("bed", "bed with a pillow", "couch and lamp", "seat", "bathtub"),
    "bicycle": ("bicycle", "bicycle with two wheels", "kick scooter", "ferris wheel", "wheel"),
    "cheese wedge": ("cheese wedge", "yellow piece of cheese with holes", "cheese", "bread", "pizza"),
    "cookie": ("cookie", "chocolate chip cookie", "doughnut", "pancakes", "chocolate bar"),
    "crab": ("crab", "red crab with claws", "scorpion", "squid", "spider"),
    "drum": ("drum", "red drum with drumsticks", "oil drum", "trumpet", "bathtub"),
    "fire engine": ("fire engine", "red fire truck with a ladder", "delivery truck", "bus", "ambulance"),
    "jeans": ("jeans", "blue trousers", "t-shirt", "dress", "woman’s clothes"),
    "lizard": ("lizard", "green lizard", "turtle", "frog", "dragon"),
}
"""What a person would ask the base for: the name, a description (`OWN`), and the nearest things that it was trained on."""
OWN = 2
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
    """What the base's best prompts are worth, and the pictures of the concept's own."""
    style, seeds = STYLES[number % len(STYLES)], range(DRAWN, DRAWN + TRIED)

    def right(prompt: str, seeds: Sequence[int] = range(DRAWN)) -> tuple[float, list[Image.Image]]:
        images = draw(base, prompt, None, guidance, seeds)
        return shares(judged(images), means, number), images

    def best(phrases: Sequence[str]) -> str:
        prompts = [w.format(phrase, style=style) for phrase in phrases for w in WORDINGS]
        return max(prompts, key=lambda prompt: right(prompt, seeds)[0])

    phrases = PHRASES[FROZEN[number]]
    own, near = best(phrases[:OWN]), best(phrases[OWN:])
    share, images = right(own)
    return {"best_prompt": own, "base": share, "nearest_prompt": near, "nearest": right(near)[0]}, images


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
    made = [pictures(name, i) for i, name in enumerate(FROZEN)]
    with EagerEngine(base) as engine:
        seen = rendered(engine, [i for _, images in made for i in images])
    others = judged(seen).reshape(len(FROZEN), OTHERS, -1)
    means = others.mean(1)
    rows, strips = [], []
    for i in range(asked.concepts):
        row, plain = untaught(base, i, means, asked.guidance)
        row |= {"concept": FROZEN[i], "real": shares(others[i], means, i)}
        drawn = []
        if not asked.untaught:
            adapter, seconds = teach(base, made[i][0], settings, asked.work)
            drawn = draw(base, "a photo of <thing>", adapter, asked.guidance)
            row |= {"seconds": round(seconds, 1), "right": shares(judged(drawn), means, i)}
        rows.append(row)
        strips.append([*made[i][0][:3], *drawn[:12], *plain[:3]])
        print(rows[-1], flush=True)
    if asked.sheet:
        sheet = Image.new("RGB", (18 * 66, len(strips) * 66), "white")
        for y, strip in enumerate(strips):
            for x, image in enumerate(strip):
                sheet.paste(image.resize((64, 64)), (x * 66, y * 66))
        sheet.save(asked.sheet)
    told = [k for k in ("seconds", "right", "base", "nearest", "real") if k in rows[0]]
    mean = {k: round(float(np.mean([r[k] for r in rows])), 3) for k in told}
    print(
        json.dumps(
            {
                "benchmark": "teach",
                "weights": base.spec.entry.fingerprint.weights[:12],
                "judge": JUDGE,
                "concepts": len(rows),
                "threads": torch.get_num_threads(),
                **settings.dump(),
                **mean,
            }
        )
    )


if __name__ == "__main__":
    main()
