"""Choose, once and before training, which concepts are trained on and which are held out; the result, `split.json`, is committed.

Held out: 160 concepts drawn at random (seeded) from those that most styles draw and that an image encoder tells apart from
one style to the next: 40 `fit` (timestep weights, calibration), 20 `sweep` (settings), 100 `test`. Trained on: of the rest,
the TRAINED that are recognised best across styles. A concept whose styles disagree teaches a small model mostly noise.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from sources import STYLES, WORK

from benchmarks.lite0 import lite0

TRAINED = 240
MIN_STYLES = 6
SPLIT = Path(__file__).with_name("split.json")


def on_white(rgba: np.ndarray) -> Image.Image:
    """A drawing over white, with a margin."""
    page = Image.new("RGB", (128, 128), "white")
    picture = Image.fromarray(rgba)
    page.paste(picture, (16, 16), picture)
    return page.resize((64, 64), Image.Resampling.LANCZOS)


def ranks_across_styles(features: np.ndarray, concept: np.ndarray, style: np.ndarray) -> np.ndarray:
    """For each drawing, the rank (0 is best) of its own concept when looked up among the means of the other styles."""
    ranks = np.zeros(len(features), dtype=int)
    count = concept.max() + 1
    for s in np.unique(style):
        others = style != s
        means = np.zeros((count, features.shape[1]), dtype=np.float32)
        np.add.at(means, concept[others], features[others])
        means /= np.linalg.norm(means, axis=1, keepdims=True) + 1e-9
        similar = features[style == s] @ means.T
        own = similar[np.arange(len(similar)), concept[style == s]]
        ranks[style == s] = (similar > own[:, None]).sum(1)
    return ranks


def main() -> None:
    drawings = np.load(WORK / "drawings.npz")
    concept, style, names, subgroup = (drawings[k] for k in ("concept", "style", "names", "subgroup"))
    features = lite0([on_white(p) for p in drawings["pixels"]])
    ranks = ranks_across_styles(features, concept, style)
    visible = np.isin(style, [i for i, s in enumerate(STYLES) if not s.held_out])
    print(f"look-up across styles among {len(names)}: top-1 {np.mean(ranks == 0):.2f}, top-5 {np.mean(ranks < 5):.2f}")

    def log_rank(i: int) -> float:
        return float(np.mean(np.log1p(ranks[visible & (concept == i)])))

    eligible = [i for i in range(len(names)) if np.sum(visible & (concept == i)) >= MIN_STYLES]
    clear = sorted(eligible, key=log_rank)[: TRAINED + 160 + 40]
    rng = np.random.default_rng(0)
    held = [int(i) for i in rng.permutation(clear)[:160]]
    trained = [i for i in clear if i not in held][:TRAINED]
    split = {
        "fit": sorted(str(names[i]) for i in held[:40]),
        "sweep": sorted(str(names[i]) for i in held[40:60]),
        "test": sorted(str(names[i]) for i in held[60:]),
        "train": sorted(str(names[i]) for i in trained),
    }
    SPLIT.write_text(json.dumps(split, indent=1, ensure_ascii=False) + "\n")
    print({k: len(v) for k, v in split.items()}, "subgroups trained:", len({int(subgroup[i]) for i in trained}))


if __name__ == "__main__":
    main()
