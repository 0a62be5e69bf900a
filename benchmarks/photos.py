"""Real photos through the whole path: teach every zip of a folder in sequence, draw, recognise the photo kept aside.

The built-in base is a small model of emoji: photos are far from what it has seen, and this shows what it makes of them.
Each zip's last photo is not taught; the diffusion classifier is asked for its concept at the end. `--sheet` is the picture
to look at: a row a concept, the photos first, then what was drawn.

    python benchmarks/photos.py --photos DIR [--limit 5] [--base B] [--sheet FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageOps

import cpserve
from benchmarks.timing import keep
from cpserve.engines.eager import EagerEngine
from cpserve.learning import head_adapter, learn

DRAWN = 8


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--photos", type=Path, required=True)
    arguments.add_argument("--limit", type=int, default=5)
    arguments.add_argument("--base", default="builtin:emoji64")
    arguments.add_argument("--steps", type=int, default=300)
    arguments.add_argument("--sheet", type=Path)
    asked = arguments.parse_args()
    base, settings = cpserve.load_base(asked.base), cpserve.Settings(steps=asked.steps)
    concepts = [cpserve.read_concept(path) for path in sorted(asked.photos.glob("*.zip"))[: asked.limit]]
    kept = [c.pictures[-1].image for c in concepts]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        store = cpserve.Store(Path(folder))
        for concept in concepts:
            learn(base, [replace(concept, pictures=concept.pictures[:-1])], store, "photos", settings)
            print(f"{concept.name}: learned after {time.monotonic() - began:.0f} s", flush=True)
        adapter = head_adapter(store, "photos", base, settings.method)
    seconds = (time.monotonic() - began) / len(concepts)
    with EagerEngine(base) as engine:
        answers = cpserve.classify(engine, kept, adapter)
        prompts = [
            cpserve.Prompt(f"a photo of {c.token}", adapter) for c in adapter.manifest.concepts for _ in range(DRAWN)
        ]
        drawn = cpserve.generate(engine, prompts, [*range(DRAWN)] * len(concepts), cpserve.Drawing(guidance=3.0))
    if asked.sheet:
        columns = 4 + DRAWN
        sheet = Image.new("RGB", (columns * 66, len(concepts) * 66), "white")
        for y, concept in enumerate(concepts):
            row = [*(p.image for p in concept.pictures[:4]), *(d.image for d in drawn[y * DRAWN : (y + 1) * DRAWN])]
            for x, image in enumerate(row):
                sheet.paste(ImageOps.fit(image, (64, 64)), (x * 66, y * 66))
        sheet.save(asked.sheet)
    right = [a.label == c.name for a, c in zip(answers, concepts, strict=True)]
    keep("photos", {
        "concepts": [c.name for c in concepts], "weights": base.spec.entry.fingerprint.weights[:12],
        "seconds_each": round(seconds, 1), "dc_right_of_kept_photos": sum(right), "labels": [a.label for a in answers],
        **settings.dump(),
    })  # fmt: skip


if __name__ == "__main__":
    main()
