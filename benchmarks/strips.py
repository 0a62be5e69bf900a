"""What each method draws of all concepts after the last one: a strip a run, and all of them as one picture for the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from cpserve.cli._pictures import grid

STRIPS = Path(__file__).parent / "results" / "strips"
SHEET = Path(__file__).parents[1] / "docs" / "forgetting.png"
LABEL = 90  # pixels of a row's name


def keep_strip(method: str, images: Sequence[Image.Image]) -> None:
    """A picture of each concept, in the order in which they were learned."""
    STRIPS.mkdir(parents=True, exist_ok=True)
    grid(images, len(images)).save(STRIPS / f"{method}.png", optimize=True)


def sheet(methods: Sequence[str]) -> Path:
    """All strips under one another, each with its method's name."""
    strips = [Image.open(STRIPS / f"{method}.png") for method in methods]
    rows = grid(strips, 1)
    page = Image.new("RGB", (LABEL + rows.width, rows.height), "white")
    page.paste(rows, (LABEL, 0))
    pen, each = ImageDraw.Draw(page), (rows.height + 2) / len(strips)
    for i, method in enumerate(methods):
        pen.text((4, (i + 0.5) * each), method, fill="black", anchor="lm", font_size=13)
    page.save(SHEET, optimize=True)
    return SHEET
