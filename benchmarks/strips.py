"""What each method draws of all concepts after the last one: a strip a run, and all of them as one picture for the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from cpserve.cli._pictures import grid, labelled

STRIPS = Path(__file__).parent / "results" / "strips"
SHEET = Path(__file__).parents[1] / "docs" / "forgetting.png"


def keep_strip(method: str, images: Sequence[Image.Image]) -> None:
    """A picture of each concept, in the order in which they were learned."""
    STRIPS.mkdir(parents=True, exist_ok=True)
    grid(images, len(images)).save(STRIPS / f"{method}.png", optimize=True)


def sheet(methods: Sequence[str]) -> Path:
    """All strips under one another, each with its method's name."""
    strips = [Image.open(STRIPS / f"{method}.png") for method in methods]
    labelled(grid(strips, 1), methods).save(SHEET, optimize=True)
    return SHEET
