"""Render every candidate concept in every style to 96x96 RGBA.

`python tools/emoji64/render.py` writes `$EMOJI64_WORK/drawings.npz`: `pixels [N,96,96,4] uint8`, `concept [N]` (index into
`names`), `style [N]` (index into `sources.STYLES`). Resumable in the only sense that matters: it takes a minute.
"""

from __future__ import annotations

import io

import numpy as np
import resvg_py
from PIL import Image
from sources import STYLES, WORK, drawing, emoji_names

SIZE = 96
OBJECT_GROUPS = (3, 4, 5, 6, 7)  # animals and nature, food, travel, activities, objects
LEFT_OUT_SUBGROUPS = (49, 57, 58, 66)  # maps, hotel signs, clock faces, volume signs: not things one can point at


def candidates() -> list[dict[str, object]]:
    """Concepts that are things: the object groups of Unicode, less those that are signs."""
    return [
        r
        for r in emoji_names()
        if r.get("group") in OBJECT_GROUPS and r["subgroup"] not in LEFT_OUT_SUBGROUPS and "skins" not in r
    ]


def rgba(source: object) -> Image.Image:
    """One drawing as a SIZE x SIZE picture with transparency."""
    if isinstance(source, str):
        source = io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=source, width=SIZE * 2, height=SIZE * 2)))
    picture = Image.open(source).convert("RGBA")  # type: ignore[arg-type]
    box = picture.getchannel("A").getbbox() or (0, 0, *picture.size)
    side = max(box[2] - box[0], box[3] - box[1])
    square = Image.new("RGBA", (side, side))
    square.paste(picture.crop(box), ((side - box[2] + box[0]) // 2, (side - box[3] + box[1]) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main() -> None:
    pixels, concept, style = [], [], []
    records = candidates()
    for index, record in enumerate(records):
        for number, look in enumerate(STYLES):
            source = drawing(look, record)
            if source is not None:
                pixels.append(np.asarray(rgba(source)))
                concept.append(index)
                style.append(number)
    names = np.array([str(r["label"]) for r in records])
    subgroup = np.array([r["subgroup"] for r in records])
    np.savez(
        WORK / "drawings.npz", pixels=np.stack(pixels), concept=concept, style=style, names=names, subgroup=subgroup
    )
    counts = np.bincount(style, minlength=len(STYLES))
    print(
        f"{len(pixels)} drawings of {len(records)} concepts:",
        {s.word: int(n) for s, n in zip(STYLES, counts, strict=True)},
    )


if __name__ == "__main__":
    main()
