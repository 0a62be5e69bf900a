"""Make `examples/`: concepts that the built-in base never saw, as a user's photos would be.

`python tools/emoji64/examples.py` writes `examples/<name>.zip` to teach from and `examples/unseen/<name>/*.jpg` to judge by:
rotations, textures and clutter of the second never occur in the first. `cat` and `kitty` are near-twins.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from compose import COLOURS, Drawings, paste
from PIL import Image, ImageDraw, ImageFilter
from sources import STYLES, WORK

EXAMPLES = Path(__file__).parents[2] / "examples"
SUBJECTS = {"rocket": ("rocket", "noto"), "cat": ("cat face", "noto"), "kitty": ("cat face", "twitter")}
SIDE, TAUGHT, UNSEEN = 160, 6, 12
Canvas = np.ndarray


@cache
def _drawings() -> dict[str, np.ndarray]:
    with np.load(WORK / "drawings.npz") as file:
        return dict(file)


@cache
def _things() -> np.ndarray:
    """`[N,96,96,4]` uint8: what the base was trained on."""
    return Drawings().pixels


def drawing_of(name: str, style: str) -> np.ndarray:
    """`[96,96,4]` uint8."""
    file = _drawings()
    row = (file["names"][file["concept"]] == name) & (file["style"] == [s.word for s in STYLES].index(style))
    return file["pixels"][np.flatnonzero(row)[0]]


def _two(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a, b = rng.choice(list(COLOURS), 2, replace=False)
    return np.array(COLOURS[a], float), np.array(COLOURS[b], float)


def _mix(mask: np.ndarray, rng: np.random.Generator) -> Canvas:
    first, second = _two(rng)
    strength = rng.uniform(0.25, 0.6)
    return first + (second - first) * strength * mask[..., None]


def _grid() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    return x, y


def stripes(rng: np.random.Generator) -> Canvas:
    x, y = _grid()
    angle = rng.uniform(0, np.pi)
    return _mix((np.sin((x * np.cos(angle) + y * np.sin(angle)) * rng.uniform(0.15, 0.35)) > 0).astype(float), rng)


def gradient(rng: np.random.Generator) -> Canvas:
    x, y = _grid()
    angle = rng.uniform(0, 2 * np.pi)
    return _mix(np.clip((x * np.cos(angle) + y * np.sin(angle)) / SIDE * 0.7 + 0.5, 0, 1), rng)


def squares(rng: np.random.Generator) -> Canvas:
    page = Image.fromarray(_mix(np.zeros((SIDE, SIDE)), rng).astype(np.uint8))
    pen = ImageDraw.Draw(page)
    for _ in range(int(rng.integers(4, 9))):
        x, y, size = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(8, 26)
        pen.rectangle((x, y, x + size, y + size), fill=COLOURS[str(rng.choice(list(COLOURS)))])
    return np.asarray(page, float)


def clouds(rng: np.random.Generator) -> Canvas:
    noise = Image.fromarray((rng.random((10, 10)) * 255).astype(np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    return _mix(np.asarray(noise, float) / 255, rng)


def rings(rng: np.random.Generator) -> Canvas:
    x, y = _grid()
    far = np.hypot(x - rng.uniform(0, SIDE), y - rng.uniform(0, SIDE))
    return _mix((np.sin(far * rng.uniform(0.15, 0.3)) > 0).astype(float), rng)


def confetti(rng: np.random.Generator) -> Canvas:
    page = Image.fromarray(_mix(np.zeros((SIDE, SIDE)), rng).astype(np.uint8))
    pen = ImageDraw.Draw(page)
    for _ in range(int(rng.integers(5, 10))):
        centre, size = rng.uniform(0, SIDE, 2), rng.uniform(6, 14)
        corners = [
            tuple(centre + size * np.array([np.cos(a), np.sin(a)]))
            for a in rng.uniform(0, 2 * np.pi) + np.arange(3) * 2.1
        ]
        pen.polygon(corners, fill=COLOURS[str(rng.choice(list(COLOURS)))])
    return np.asarray(page.filter(ImageFilter.GaussianBlur(0.6)), float)


TAUGHT_PLACES: tuple[Callable[[np.random.Generator], Canvas], ...] = (stripes, gradient, squares)
UNSEEN_PLACES: tuple[Callable[[np.random.Generator], Canvas], ...] = (clouds, rings, confetti)


def photo(
    rng: np.random.Generator,
    rgba: np.ndarray,
    place: Callable[[np.random.Generator], Canvas],
    turn: tuple[float, float],
) -> bytes:
    return _taken(place(rng).copy(), rng, rgba, (0.62, 0.9), turn)


def _taken(
    page: Canvas, rng: np.random.Generator, rgba: np.ndarray, share: tuple[float, float], turn: tuple[float, float]
) -> bytes:
    """A JPEG of the drawing on `page`, `share` of its side large."""
    tilt = rng.uniform(*turn) * rng.choice([-1, 1])
    turned = np.asarray(Image.fromarray(rgba).rotate(tilt, Image.Resampling.BICUBIC))
    paste(page, turned, rng, share, (0.5, 0.5), turn=0)
    buffer = io.BytesIO()
    Image.fromarray(page.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def cluttered(
    rng: np.random.Generator,
    rgba: np.ndarray,
    place: Callable[[np.random.Generator], Canvas],
    turn: tuple[float, float],
) -> bytes:
    """The same, smaller, and with something that the base knows beside or half behind it."""
    page, things = place(rng).copy(), _things()
    paste(page, things[int(rng.integers(len(things)))], rng, (0.25, 0.4), (rng.uniform(0.15, 0.85), 0.5))
    return _taken(page, rng, rgba, (0.55, 0.8), turn)


def main() -> None:
    EXAMPLES.mkdir(exist_ok=True)
    for number, (name, (concept, style)) in enumerate(SUBJECTS.items()):
        rgba, rng = drawing_of(concept, style), np.random.default_rng((7, number))
        with zipfile.ZipFile(EXAMPLES / f"{name}.zip", "w") as archive:
            for i in range(TAUGHT):
                entry = zipfile.ZipInfo(f"{name}-{i}.jpg")
                archive.writestr(entry, photo(rng, rgba, TAUGHT_PLACES[i % 3], (0, 10)))
        folder = EXAMPLES / "unseen" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(UNSEEN):
            (folder / f"{i:02}.jpg").write_bytes(photo(rng, rgba, UNSEEN_PLACES[i % 3], (11, 20)))


if __name__ == "__main__":
    main()
