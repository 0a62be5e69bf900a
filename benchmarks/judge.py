"""Which features of Lite0 agree with a person about what taught concepts look like? `teach.py` judges by the winner.

Fitting concepts only, none of them judged by later: each is taught well (300 steps) and badly (40), and the untaught base
draws it by its name, and what it knows that looks most like it, twelve pictures each. A person looks at the sheet and
counts, for each row, the pictures that show the concept; the counts, of two sittings, stand in `results/judge_person.json`.
Every set of features, with and without classes of the lookalikes, then counts the same rows among the 20 fitting concepts as
classes, and is judged by its mean absolute distance from the person's share.

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
from benchmarks.lite0 import Classes, lite0, lite0_layout
from benchmarks.teach import OTHERS, draw, kept, pictures, teach, with_lookalikes
from cpserve.base import BaseModel
from cpserve.engines.eager import EagerEngine
from cpserve.evaluation import rendered
from trainer import Settings

CLASSES = (
    "artist palette", "baby chick", "chipmunk", "factory", "fax machine", "fire", "fish", "fox", "horse", "mountain",
    "movie camera", "oncoming taxi", "peach", "peanuts", "pencil", "roller coaster", "saxophone", "snowman", "stop sign", "sushi",
)  # fmt: skip
TAUGHT = 10
LOOKALIKES = (
    "pizza",
    "rooster",
    "mouse",
    "house",
    "printer",
    "glowing star",
    "dolphin",
    "dog face",
    "carousel horse",
    "pine decoration",
)
"""What the base was trained on that looks most like each of the first classes."""
STEPS = (300, 40, 0, -1)
"""Of teaching; at 0 the untaught base is asked for the concept by its name, at -1 for the lookalike."""
DRAWN = 12
PERSON = Path(__file__).parent / "results" / "judge_person.json"


def draw_all(base: BaseModel, work: Path) -> None:
    """`work/<class>-<steps>.png`, a strip of DRAWN pictures each, and `work/sheet.png`."""
    work.mkdir(parents=True, exist_ok=True)
    for number in range(TAUGHT):
        for steps in STEPS:
            kept(work / f"{number}-{steps}.png", lambda n=number, s=steps: drawn(base, n, s, work))
            print(f"{CLASSES[number]}, {steps} steps", flush=True)
    sheet = Image.new("RGB", (16 * 66, TAUGHT * len(STEPS) * 66), "white")
    for number in range(TAUGHT):
        images, _ = pictures(CLASSES[number], number)
        for row, steps in enumerate(STEPS):
            strip = [*images[:3], *read(work / f"{number}-{steps}.png")]
            for x, image in enumerate(strip):
                sheet.paste(image.resize((64, 64)), (x * 66 + 66 * (x > 2), (number * len(STEPS) + row) * 66))
    sheet.save(work / "sheet.png")


def drawn(base: BaseModel, number: int, steps: int, work: Path) -> list[Image.Image]:
    if steps <= 0:
        name = LOOKALIKES[number] if steps else CLASSES[number]
        return draw(base, f"a picture of a {name}", None, 3.0, range(DRAWN))
    adapter, _ = teach(base, pictures(CLASSES[number], number)[0], Settings(steps=steps), work / "run")
    return draw(base, "a photo of <thing>", adapter, 3.0, range(DRAWN))


def read(strip: Path) -> list[Image.Image]:
    return kept(strip, list)


def agree(base: BaseModel, work: Path) -> None:
    """Print every set of features' distance from the person, best first."""
    person = json.loads(PERSON.read_text())
    sharp = with_lookalikes(CLASSES, LOOKALIKES)
    with EagerEngine(base) as engine:
        soft = rendered(engine, sharp)
    keys = [f"{n}-{steps}" for n in range(TAUGHT) for steps in STEPS]
    drawn = [image for key in keys for image in read(work / f"{key}.png")]
    wanted = np.array([np.mean(person[key]) / DRAWN for key in keys])
    sets = {"last, pooled": lite0} | {
        f"block {block}, {cells}x{cells}": lambda p, b=block, c=cells: lite0_layout(p, b, c)
        for block in (5, 8, 10, 13)
        for cells in (1, 2, 4)
    }
    rows = []
    for name, features in sets.items():
        seen = features(drawn).reshape(len(keys), DRAWN, -1)
        for kind, classes in (("sharp", sharp), ("through the autoencoder", soft)):
            every = Classes.of(features(classes).reshape(len(sharp) // OTHERS, OTHERS, -1))
            for lookalikes, known in ((True, every), (False, every.first(len(CLASSES)))):
                counted = np.array([known.right(seen[i], int(key.split("-")[0])) for i, key in enumerate(keys)])
                by_steps = {str(s): round(float(counted[j :: len(STEPS)].mean()), 3) for j, s in enumerate(STEPS)}
                distance = round(float(np.abs(counted - wanted).mean()), 4)
                rows.append(
                    {"features": name, "classes": kind, "lookalikes": lookalikes, "distance": distance, **by_steps}
                )
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
