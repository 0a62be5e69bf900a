"""Judge a model folder on the frozen prompts. `python tools/emoji64/evaluate.py FOLDER [--sheet PNG]`; one JSON line last.

A picture counts when EfficientNet-Lite0 puts it nearest (cosine) to the mean of its own concept's drawings, as the model's
autoencoder renders them, among all trained concepts; its background counts when the middle of its border is nearest to the colour that was asked for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from compose import COLOURS, Drawings, _jitter, paste
from PIL import Image
from prompts import PROMPTS
from sources import WORK

import cpserve
from benchmarks.lite0 import lite0
from cpserve.engine import Engine
from cpserve.evaluation import rendered


def class_means(engine: Engine, drawings: Drawings, names: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means `[N,1280]`, and the features and class of each drawing that they are made from; cached in the work folder.

    The drawings go through the base's own autoencoder: the encoder was trained on photographs and would otherwise judge
    sharpness before it judges what is shown.
    """
    cache = WORK / f"class_means-{engine.spec.entry.fingerprint.weights[:12]}.npz"
    if not cache.exists():
        rng, pages = np.random.default_rng(5), []
        for rgba in drawings.pixels:
            page = np.broadcast_to(_jitter(rng, str(rng.choice(list(COLOURS)))), (64, 64, 3)).copy()
            paste(page, rgba, rng, (0.7, 0.95), (0.5, 0.5))
            pages.append(Image.fromarray(page.clip(0, 255).astype(np.uint8)))
        np.savez(cache, features=lite0(rendered(engine, pages)))
    features = np.load(cache)["features"]
    own = np.array([names.index(n) for n in drawings.names])
    means = np.stack([features[own == i].mean(0) for i in range(len(names))])
    return means, features, own


def ranks(features: np.ndarray, means: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many concepts are nearer than the own one, after taking away what all concepts share."""
    centre = means.mean(0)
    means = (means - centre) / np.linalg.norm(means - centre, axis=1, keepdims=True)
    similar = (features - centre) @ means.T
    return (similar > similar[np.arange(len(own)), own][:, None]).sum(1)


def border_colour(image: Image.Image) -> str:
    pixels = np.asarray(image, dtype=float)
    border = np.concatenate(
        [
            pixels[:3].reshape(-1, 3),
            pixels[-3:].reshape(-1, 3),
            pixels[:, :3].reshape(-1, 3),
            pixels[:, -3:].reshape(-1, 3),
        ]
    )
    middle = np.median(border, axis=0)
    return min(COLOURS, key=lambda c: float(np.abs(middle - np.array(COLOURS[c])).sum()))


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder")
    arguments.add_argument("--sheet", default="/tmp/sheet.png")
    arguments.add_argument("--guidance", type=float, default=4.0)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--keep", action="store_true", help="write the result and the sheet into the folder")
    arguments.add_argument("--count", type=int, default=10**6)
    asked = arguments.parse_args()
    prompts = json.loads(PROMPTS.read_text())
    names = [p["name"] for p in prompts]
    step = max(1, len(prompts) // asked.count)
    chosen = prompts[::step]
    with cpserve.open_engine(asked.folder) as engine:
        means, real, real_own = class_means(engine, Drawings(), names)
        ceiling = ranks(real, means, real_own)
        drawn = cpserve.generate(
            engine,
            [cpserve.Prompt(p["prompt"]) for p in chosen],
            [0] * len(chosen),
            cpserve.Drawing(guidance=asked.guidance, steps=asked.steps),
        )
    rank = ranks(lite0([d.image for d in drawn]), means, np.array([names.index(p["name"]) for p in chosen]))
    colour = np.mean([border_colour(d.image) == p["colour"] for d, p in zip(drawn, chosen, strict=True)])
    columns = 16
    sheet = Image.new("RGB", (columns * 66, -(-len(drawn) // columns) * 66), "white")
    for i, d in enumerate(drawn):
        sheet.paste(d.image, (i % columns * 66, i // columns * 66))
    Path(asked.sheet).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(asked.sheet)
    result = {"prompts": len(chosen), "concepts": len(names), "guidance": asked.guidance, "steps": asked.steps}
    result |= {f"top{k}": round(float(np.mean(rank < k)), 3) for k in (1, 5)} | {"background": round(float(colour), 3)}
    line = json.dumps(result | {"drawings_top1": round(float(np.mean(ceiling < 1)), 3)})
    if asked.keep:
        (Path(asked.folder) / "evaluation.json").write_text(line + "\n")
        sheet.save(Path(asked.folder) / "samples.jpg", quality=88)
    print(line)


if __name__ == "__main__":
    main()
