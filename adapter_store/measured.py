"""What `cpserve eval` measured of a version: read from its file, drawn as a matrix, and put on the version's card.

Knows the file and the picture. Does not know how anything is measured.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import asdict, replace
from PIL import Image, ImageDraw, ImageFont

from adapter_store.card import render_card
from adapter_store.layout import CARD, EVALUATION, MATRIX
from adapter_store.version import Version
from cpserve.errors import AdapterError
from cpserve.manifest import Manifest, plain
from cpserve.png import png

CELL, TEXT, GAP = (72, 36), 15, 8  # pixels
LONGEST = 24  # characters of a name
FULL, EMPTY = (47, 111, 179), (240, 240, 240)  # of a concept that is all there, and of one that is gone

Cosine = Annotated[float, Meta(ge=-1.001, le=1.001)]  # of float32, which rounds


class Evaluation(Struct, frozen=True):
    """The part of `evaluation.json` that is kept: of which version it is, by name and by the hash of its manifest, and what was
    measured; `kept_matrix[j][i]` is concept i under the version with j + 1 concepts.
    """

    version: str
    manifest_sha256: str
    judge: str
    concepts: Annotated[tuple[str, ...], Meta(min_length=1)]
    kept_matrix: dict[int, dict[int, Cosine]]
    kept: float | None = None
    alignment: float | None = None
    forgetting: float | None = None
    a_mmd: float | None = None
    f_mmd: float | None = None
    dc: float | None = None
    drift: float | None = None

    @property
    def scores(self) -> dict[str, Any]:
        """What was measured in one number each."""
        told = {k: v for k, v in asdict(self).items() if isinstance(v, float)}
        return {**told, "judge": self.judge}


def read_evaluation(path: str, content: bytes) -> Evaluation:
    """Read the file that `cpserve eval` writes.

    Raises:
        AdapterError: it is none.
    """
    try:
        read = msgspec.json.decode(content, type=Evaluation)
    except (ValueError, RecursionError) as error:
        raise _no_evaluation(path, plain(error)) from None
    count = len(read.concepts)
    if {j: set(row) for j, row in read.kept_matrix.items()} != {j: set(range(j + 1)) for j in range(count)}:
        raise _no_evaluation(path, "its matrix does not hold each concept under each version that knows it")
    return read


def annotated(version: Version, path: str, content: bytes) -> tuple[Manifest, dict[str, bytes]]:
    """A version's content with what was measured of it: the draft of a new version, and its files.

    Raises:
        AdapterError: `content` is no evaluation, or one of another version.
        IntegrityError: a file of the version is damaged.
        StoreError: one was not pulled.
    """
    read, manifest = read_evaluation(path, content), version.manifest
    if read.manifest_sha256 != version.pin.manifest_sha256:
        raise AdapterError(
            f"{path} measures {plain(read.version)}, not what {version} is here",
            hint=f"measure it: cpserve eval {version} --out DIR",
        )
    draft = replace(manifest, metrics={**manifest.metrics, **read.scores})
    files = {path: version.read(path) for path in version.paths()}
    files |= {EVALUATION: content, MATRIX: draw_matrix(read)}
    return draft, {**files, CARD: render_card(draft, manifest.name, files).encode()}


def draw_matrix(read: Evaluation) -> bytes:
    """A PNG: a row a concept, a column a version, in each field how much of the concept is left, from 0 to 1."""
    font = ImageFont.load_default(TEXT)
    names = [name if len(name) <= LONGEST else f"{name[: LONGEST - 2]}.." for name in read.concepts]
    longest = round(max(font.getlength(f"+ {name}") for name in names))
    count, left, wide, high = len(names), longest + GAP * 2, max(CELL[0], longest + GAP), CELL[1]
    image = Image.new("RGB", (left + wide * count, high * (count + 1)), "white")
    pen = ImageDraw.Draw(image)

    def write(x: float, y: float, text: str, anchor: str, color: str = "black") -> None:
        pen.text((x, y), text, color, font, anchor)

    for i, name in enumerate(names):
        write(left + wide * (i + 0.5), high / 2, f"+ {name}", "mm")
        write(left - GAP, high * (i + 1.5), name, "rm")
        for j in range(i, count):
            value = read.kept_matrix[j][i]
            share = max(0.0, value)
            color = tuple(round(empty + share * (full - empty)) for full, empty in zip(FULL, EMPTY, strict=True))
            x, y = left + wide * j, high * (i + 1)
            pen.rectangle((x + 1, y + 1, x + wide - 2, y + high - 2), color)
            write(x + wide / 2, y + high / 2, f"{value:.2f}", "mm", "white" if share > 0.5 else "black")
    return png(image)


def _no_evaluation(path: str, why: str) -> AdapterError:
    return AdapterError(f"{path} is not what cpserve eval writes: {why}", hint="make it: cpserve eval REF --out DIR")
