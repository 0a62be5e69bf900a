"""Which features of Lite0 agree with a person about what taught concepts look like? `teach.py` judges by the winner.

Fitting concepts only, none of them judged by later: each is taught well (300 steps) and badly (40), and drawn by name by
the untaught base, twelve pictures each. A person looks at the sheet and counts, for each row, the pictures that show the
concept; the counts stand in `results/judge_person.json`. Every set of features then counts the same rows, among the 20
fitting concepts as classes, and is judged by its mean absolute distance from the person's share.

    python benchmarks/judge.py draw --work DIR     # teach, draw, write DIR/sheet.png (resumes)
    python benchmarks/judge.py agree --work DIR    # one line a set of features; the last line is JSON
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "emoji64"))
import cpserve
from benchmarks.lite0 import lite0, lite0_layout
from benchmarks.teach import draw, pictures, shares, teach
from cpserve.base import BaseModel
from cpserve.engines.eager import EagerEngine
from cpserve.evaluation import rendered
from trainer import Settings

CLASSES = (
    "artist palette", "baby chick", "chipmunk", "factory", "fax machine", "fire", "fish", "fox", "horse", "mountain",
    "movie camera", "oncoming taxi", "peach", "peanuts", "pencil", "roller coaster", "saxophone", "snowman", "stop sign", "sushi",
)  # fmt: skip
TAUGHT = 10
STEPS = (300, 40, 0)
DRAWN = 12
PERSON = Path(__file__).parent / "results" / "judge_person.json"


def draw_all(base: BaseModel, work: Path) -> None:
    """`work/<class>-<steps>.png`, a strip of DRAWN pictures each, and `work/sheet.png`."""
    work.mkdir(parents=True, exist_ok=True)
    for number in range(TAUGHT):
        images, _ = pictures(CLASSES[number], number)
        for steps in STEPS:
            path = work / f"{number}-{steps}.png"
            if path.exists():
                continue
            adapter = teach(base, images, Settings(steps=steps), work / "run")[0] if steps else None
            prompt = "a photo of <thing>" if adapter else f"a picture of a {CLASSES[number]}"
            strip = Image.new("RGB", (DRAWN * 64, 64))
            for i, image in enumerate(draw(base, prompt, adapter, 3.0, range(DRAWN))):
                strip.paste(image, (i * 64, 0))
            strip.save(path)
            print(path.name, flush=True)
    sheet = Image.new("RGB", (16 * 66, TAUGHT * len(STEPS) * 66), "white")
    for number in range(TAUGHT):
        images, _ = pictures(CLASSES[number], number)
        for row, steps in enumerate(STEPS):
            strip = [*images[:3], *read(work / f"{number}-{steps}.png")]
            for x, image in enumerate(strip):
                sheet.paste(image.resize((64, 64)), (x * 66 + 66 * (x > 2), (number * len(STEPS) + row) * 66))
    sheet.save(work / "sheet.png")


def read(strip: Path) -> list[Image.Image]:
    with Image.open(strip) as whole:
        return [whole.crop((i * 64, 0, i * 64 + 64, 64)) for i in range(DRAWN)]


def agree(base: BaseModel, work: Path) -> None:
    """Print every set of features' distance from the person, best first."""
    person = json.loads(PERSON.read_text())
    sharp = [image for n in range(len(CLASSES)) for image in pictures(CLASSES[n], n)[1]]
    with EagerEngine(base) as engine:
        soft = rendered(engine, sharp)
    keys = [f"{n}-{steps}" for n in range(TAUGHT) for steps in STEPS]
    drawn = [image for key in keys for image in read(work / f"{key}.png")]
    wanted = np.array([person[key] / DRAWN for key in keys])
    sets = {"last, pooled": lite0} | {
        f"block {block}, {cells}x{cells}": lambda p, b=block, c=cells: lite0_layout(p, b, c)
        for block in (5, 8, 10, 13)
        for cells in (1, 2, 4)
    }
    rows = []
    for name, features in sets.items():
        seen = features(drawn).reshape(len(keys), DRAWN, -1)
        for kind, classes in (("sharp", sharp), ("through the autoencoder", soft)):
            means = features(classes).reshape(len(CLASSES), -1, seen.shape[-1]).mean(1)
            counted = np.array([shares(seen[i], means, int(key.split("-")[0])) for i, key in enumerate(keys)])
            by_steps = {str(s): round(float(counted[j :: len(STEPS)].mean()), 3) for j, s in enumerate(STEPS)}
            distance = round(float(np.abs(counted - wanted).mean()), 3)
            rows.append({"features": name, "classes": kind, "distance": distance, **by_steps})
    for row in sorted(rows, key=lambda r: r["distance"]):
        print(row)
    mean = {str(s): round(float(wanted[j :: len(STEPS)].mean()), 3) for j, s in enumerate(STEPS)}
    print(json.dumps({"benchmark": "judge", "person": mean, "best": min(rows, key=lambda r: r["distance"])}))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("act", choices=("draw", "agree"))
    arguments.add_argument("--base", default="builtin:emoji64")
    arguments.add_argument("--work", type=Path, default=Path("build/judge"))
    asked = arguments.parse_args()
    {"draw": draw_all, "agree": agree}[asked.act](cpserve.load_base(asked.base), asked.work)


if __name__ == "__main__":
    main()
