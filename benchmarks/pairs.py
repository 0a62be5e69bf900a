"""Are two learned concepts both in one picture? Lite0 looks through windows of a picture's left and right half.

The base learned pairs side by side, each drawing about half the picture wide, so a window of that size sees one of them.
Classes are all concepts of the split, those not learned among them: their drawings in other scenes, two side by side, as the
base's autoencoder renders them. A picture shows both if one concept is the nearest class of a window on one side, and the other
of one on the other side, each nearer than a threshold. The threshold lets through FALSE_SHARE of drawn pictures of a single
concept, judged with every other one as the second. What that share is on further such pictures stands in the result, and on
pictures of two with one of them taken for a third; so does the share found of scenes that do show both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "emoji64"))
from compose import paste

import cpserve
from benchmarks.lite0 import JUDGE, likeness, lite0_layout
from cpserve.adapter import Adapter
from cpserve.engine import Engine
from cpserve.evaluation import rendered
from examples import SIDE, UNSEEN_PLACES

WINDOW, LEFTS, TOPS = 36 / 64, (0, 28 / 64), (0, 14 / 64, 28 / 64)  # of the picture's side
FALSE_SHARE = 0.05
APART = 4  # concepts, in scenes that class means are of
Drawing = np.ndarray


def windows(picture: Image.Image) -> list[Image.Image]:
    """Those of the left half from top to bottom, then those of the right."""
    w = picture.width
    boxes = [(x * w, y * w, (x + WINDOW) * w, (y + WINDOW) * w) for x in LEFTS for y in TOPS]
    return [picture.crop(tuple(round(edge) for edge in box)) for box in boxes]


def pair_score(scores: np.ndarray, first: int, second: int) -> float:
    """How sure it is that both are there: `scores` `[windows, classes]`; -inf where one of them is nowhere the nearest class."""
    nearest = scores.argmax(1)
    sides = np.arange(len(scores)) // len(TOPS)

    def seen(own: int, side: int) -> float:
        return float(scores[(nearest == own) & (sides == side), own].max(initial=-np.inf))

    return max(min(seen(first, 0), seen(second, 1)), min(seen(second, 0), seen(first, 1)))


def threshold(false: Sequence[float], share: float = FALSE_SHARE) -> float:
    """The lowest score that at most `share` of the false ones exceed."""
    return float(np.quantile(false, 1 - share, method="higher"))


def scene(rng: np.random.Generator, pair: Sequence[Drawing]) -> tuple[Image.Image, list[int]]:
    """Two drawings side by side, laid out as the base's own training pictures; the window that frames each best."""
    page, framing = UNSEEN_PLACES[int(rng.integers(len(UNSEEN_PLACES)))](rng).copy(), []
    for side, (x, drawing) in enumerate(zip((0.26, 0.74), pair, strict=True)):
        before = page.copy()
        paste(page, drawing, rng, (0.42, 0.52), (x, 0.5))
        middle = np.flatnonzero((page != before).any((1, 2))).mean() / SIDE
        framing.append(side * len(TOPS) + int(np.abs(np.array(TOPS) + WINDOW / 2 - middle).argmin()))
    return Image.fromarray(page.clip(0, 255).astype(np.uint8)), framing


def features(pictures: Sequence[Image.Image]) -> np.ndarray:
    """`[pictures, windows, F]`."""
    seen = lite0_layout([window for picture in pictures for window in windows(picture)], *JUDGE)
    return seen.reshape(len(pictures), len(LEFTS) * len(TOPS), -1)


def scenes(
    drawings: Sequence[Drawing], pairs: Sequence[tuple[int, int]], seed: int
) -> tuple[list[Image.Image], list[list[int]]]:
    """A picture of each pair, and the windows that frame its two."""
    rng = np.random.default_rng((17, seed))
    made = [scene(rng, [drawings[i] for i in pair]) for pair in pairs]
    return [picture for picture, _ in made], [framing for _, framing in made]


def class_means(engine: Engine, drawings: Sequence[Drawing]) -> np.ndarray:
    """`[classes, F]`, of the windows that frame each drawing in `2 * APART` scenes."""
    pairs = [(i, (i + apart) % len(drawings)) for apart in range(1, APART + 1) for i in range(len(drawings))]
    pictures, framing = scenes(drawings, pairs, 0)
    framed = [windows(p)[i] for p, frames in zip(rendered(engine, pictures), framing, strict=True) for i in frames]
    seen, own = lite0_layout(framed, *JUDGE), np.array(pairs).ravel()
    return np.stack([seen[own == concept].mean(0) for concept in range(len(drawings))])


def asked_pairs(concepts: int, count: int) -> list[tuple[int, int]]:
    """`count` ordered pairs, every one as often as any other, or once more."""
    pairs = list(permutations(range(concepts), 2))
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[order[i % len(pairs)]] for i in range(count)]


def measure(
    engine: Engine,
    arms: Mapping[str, Callable[[Sequence[int]], Adapter]],
    learned: int,
    drawings: Sequence[Drawing],
    count: int,
    steps: int,
) -> dict[str, Any]:
    """`arms` give the adapter that draws some of the `learned` concepts, which are the first of `drawings`, by number; `count`
    pictures of two and as many of one are asked of each.

    `both` and `either` are shares of the pictures of two. `false` is that of pictures of one, not those behind the threshold,
    and `false_third` that of pictures of two.
    """
    means, everyone = class_means(engine, drawings), range(learned)
    two, one = asked_pairs(learned, count), [(i % learned,) for i in range(count)]
    half = count // 2  # both halves hold every concept
    both, either, false, third = {}, {}, {}, {}
    for name, adapter in arms.items():
        seen = list(zip(likeness(features(_draw(engine, two, adapter, steps)), means), two, strict=True))
        both[name] = [pair_score(s, *pair) for s, pair in seen]
        either[name] = [s.max(1)[np.isin(s.argmax(1), pair)].max(initial=-np.inf) for s, pair in seen]
        third[name] = [pair_score(s, i, j) for s, pair in seen for i in pair for j in everyone if j not in pair]
        seen = list(zip(likeness(features(_draw(engine, one, adapter, steps)), means), one, strict=True))
        false[name] = [[pair_score(s, i, j) for j in everyone if j != i] for s, (i,) in seen]
    bar = threshold([score for rows in false.values() for row in rows[:half] for score in row])
    pairs = list(permutations(everyone, 2))
    known = likeness(features(rendered(engine, scenes(drawings, pairs, 1)[0])), means)
    above = {
        "both": both,
        "either": either,
        "false": {k: rows[half:] for k, rows in false.items()},
        "false_third": third,
    }
    return {
        "asked": words((0, 1)),
        "pictures": count,
        **{what: {name: _above(values, bar) for name, values in arm.items()} for what, arm in above.items()},
        "found_in_scenes": _above([pair_score(s, *pair) for s, pair in zip(known, pairs, strict=True)], bar),
        "threshold": round(bar, 3) if np.isfinite(bar) else None,
    }


def _above(values: Sequence[float] | Sequence[Sequence[float]], bar: float) -> float:
    return round(float(np.mean(np.array(values) > bar)), 3)


def words(concepts: Sequence[int]) -> str:
    """With the articles of the captions that the base learned pairs from."""
    return f"a photo of {' and '.join(f'a <thing{i}>' for i in concepts)}"


def _draw(
    engine: Engine, asked: Sequence[Sequence[int]], adapter: Callable[[Sequence[int]], Adapter], steps: int
) -> list[Image.Image]:
    prompts = [cpserve.Prompt(words(own), adapter(own)) for own in asked]
    drawing = cpserve.Drawing(guidance=3.0, steps=steps)
    return [made.image for made in cpserve.generate(engine, prompts, range(len(prompts)), drawing)]
