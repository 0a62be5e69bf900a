"""Pictures and captions out of drawings: what the model sees in training.

A composite is one drawing (or two, side by side) at a random scale, place, rotation and flip over a plain or patterned
background; its caption says style, name and background, with parts left out at random.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from sources import STYLES, WORK

SIDE = 64
COLOURS = {
    "white": (250, 250, 250), "gray": (150, 150, 150), "black": (20, 20, 20), "red": (220, 40, 40),
    "orange": (245, 140, 30), "yellow": (250, 220, 60), "green": (60, 170, 75), "blue": (50, 110, 220),
    "purple": (140, 70, 190), "pink": (250, 150, 190),
}  # fmt: skip
PATTERNS = ("striped", "dotted", "checked")
NEUTRAL = ("a picture of", "a photo of", "a drawing of", "an emoji of", "")
PAIR_SHARE = 0.1
PATTERN_SHARE = 0.15


@dataclass(frozen=True)
class Drawings:
    """The rendered drawings of one part of the split, in the styles that training may see."""

    part: str = "train"
    held_out_style: bool = False

    @cached_property
    def _rows(self) -> np.ndarray:
        file = np.load(WORK / "drawings.npz")
        wanted = json.loads(Path(__file__).with_name("split.json").read_text())[self.part]
        seen = [i for i, s in enumerate(STYLES) if s.held_out == self.held_out_style]
        return np.flatnonzero(np.isin(file["names"][file["concept"]], wanted) & np.isin(file["style"], seen))

    @cached_property
    def pixels(self) -> np.ndarray:
        """`[N, 96, 96, 4]` uint8."""
        return np.load(WORK / "drawings.npz")["pixels"][self._rows]

    @cached_property
    def names(self) -> list[str]:
        """The name of each drawing."""
        file = np.load(WORK / "drawings.npz")
        return [str(n) for n in file["names"][file["concept"][self._rows]]]

    @cached_property
    def styles(self) -> list[str]:
        """The style word of each drawing."""
        return [STYLES[s].word for s in np.load(WORK / "drawings.npz")["style"][self._rows]]


def article(name: str) -> str:
    """`a rocket`, `an owl`."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name.lower().replace('’', '')}"


def _jitter(rng: np.random.Generator, colour: str) -> np.ndarray:
    return np.clip(np.array(COLOURS[colour]) + rng.normal(0, 8, 3), 0, 255)


def background(rng: np.random.Generator, side: int = SIDE) -> tuple[np.ndarray, str]:
    """A `[side, side, 3]` float background and the words for it."""
    colour = str(rng.choice(list(COLOURS)))
    page = np.broadcast_to(_jitter(rng, colour), (side, side, 3)).copy()
    if rng.random() > PATTERN_SHARE:
        return page, colour
    pattern = str(rng.choice(PATTERNS))
    other = _jitter(rng, str(rng.choice([c for c in COLOURS if c != colour])))
    y, x = np.mgrid[:side, :side].astype(float)
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 20)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if pattern == "striped":
        mask = (u % period) < period * 0.4
    elif pattern == "dotted":
        mask = np.hypot(u % period - period / 2, v % period - period / 2) < period * 0.28
    else:
        mask = ((u // period) + (v // period)) % 2 < 1
    page[mask] = page[mask] * 0.4 + other * 0.6
    return page, f"{colour} {pattern}"


def paste(
    page: np.ndarray,
    rgba: np.ndarray,
    rng: np.random.Generator,
    share: tuple[float, float],
    centre: tuple[float, float],
    turn: float = 12,
) -> None:
    """Lay one drawing over `page` in place: `share` of the side it takes, `centre` in sides, rotated by up to `turn` degrees."""
    side = page.shape[0]
    picture = Image.fromarray(rgba)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    size = max(8, round(side * rng.uniform(*share)))
    picture = picture.rotate(rng.uniform(-turn, turn), Image.Resampling.BICUBIC).resize(
        (size, size), Image.Resampling.LANCZOS
    )
    slack = (side - size) / 2
    spread = 0.8 * max(0.0, slack)
    left = round(centre[0] * side - size / 2 + rng.uniform(-spread, spread) * (centre[0] == 0.5))
    top = round(centre[1] * side - size / 2 + rng.uniform(-spread, spread))
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(picture, (left, top))
    layer = np.asarray(canvas, dtype=np.float64)
    alpha = layer[..., 3:] / 255
    page[:] = page * (1 - alpha) + layer[..., :3] * alpha


def caption(rng: np.random.Generator, things: str, style: str | None, ground: str) -> str:
    """Words for a composite, parts left out at random."""
    said_style = style is not None and rng.random() < 0.65
    words = f"a {style} emoji of {things}" if said_style else f"{rng.choice(NEUTRAL)} {things}".strip()
    return f"{words} on a {ground} background" if rng.random() < 0.8 else words


def composite(rng: np.random.Generator, drawings: Drawings, index: int) -> tuple[np.ndarray, str]:
    """One training picture `[64, 64, 3]` uint8 of drawing `index`, and its caption."""
    page, ground = background(rng)
    name, style = drawings.names[index], drawings.styles[index]
    if rng.random() < PAIR_SHARE:
        other = int(rng.integers(len(drawings.names)))
        order = [index, other] if rng.random() < 0.5 else [other, index]
        for place, i in zip((0.26, 0.74), order, strict=True):
            paste(page, drawings.pixels[i], rng, (0.42, 0.52), (place, 0.5))
        things = " and ".join(article(drawings.names[i]) for i in order)
        same = drawings.styles[other] == style
        words = caption(rng, things, style if same else None, ground)
    else:
        paste(page, drawings.pixels[index], rng, (0.62, 0.95), (0.5, 0.5))
        words = caption(rng, article(name) if rng.random() < 0.85 else name.lower().replace("’", ""), style, ground)
    return page.clip(0, 255).round().astype(np.uint8), words
