"""The pinned image sets that the built-in base model is made from: where they come from and how a concept is found in each.

`python tools/emoji64/sources.py` downloads them with `npm pack` into `$EMOJI64_WORK/sets`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

WORK = Path(os.environ.get("EMOJI64_WORK", Path(__file__).parents[2] / "build" / "emoji64"))
SETS = WORK / "sets"


@dataclass(frozen=True, kw_only=True)
class Style:
    """One drawing style: the word used in captions, its npm package, and whether training may see it."""

    word: str
    package: str
    version: str
    licence: str
    held_out: bool = False

    @property
    def folder(self) -> Path:
        return SETS / self.package.strip("@").replace("/", "-")


STYLES = (
    Style(word="flat", package="@iconify-json/fluent-emoji-flat", version="1.2.6", licence="MIT"),
    Style(word="glossy", package="@iconify-json/fluent-emoji", version="1.2.7", licence="MIT"),
    Style(word="3d", package="@lobehub/fluent-emoji-3d", version="1.1.0", licence="MIT"),
    Style(word="noto", package="@iconify-json/noto", version="1.2.9", licence="Apache-2.0"),
    Style(word="blob", package="@iconify-json/noto-v1", version="1.2.5", licence="Apache-2.0"),
    Style(word="twitter", package="@iconify-json/twemoji", version="1.2.5", licence="CC BY 4.0"),
    Style(word="joy", package="@iconify-json/emojione", version="1.2.3", licence="CC BY 4.0"),
    Style(word="fox", package="@iconify-json/fxemoji", version="1.2.2", licence="CC BY 4.0"),
    Style(word="line", package="@iconify-json/streamline-emojis", version="1.2.4", licence="CC BY 4.0", held_out=True),
)
NAMES = Style(word="", package="emojibase-data", version="17.0.0", licence="MIT")


def fetch(style: Style) -> None:
    """Download and unpack one package, unless its folder stands already."""
    if style.folder.exists():
        return
    SETS.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["npm", "pack", "--silent", f"{style.package}@{style.version}"],
        cwd=SETS,
        check=True,
        capture_output=True,
        text=True,
    )
    archive = SETS / done.stdout.strip()
    partial = style.folder.with_suffix(".partial")
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    (partial / "package").rename(style.folder)
    partial.rmdir()
    archive.unlink()


@cache
def emoji_names() -> tuple[dict[str, Any], ...]:
    """emojibase's records (label, hexcode, group, subgroup, tags), in Unicode's order."""
    records = json.loads((NAMES.folder / "en" / "data.json").read_text())
    return tuple(sorted((r for r in records if "order" in r), key=lambda r: r["order"]))


def slug(label: str) -> str:
    """A label as icon sets spell it: `red apple` -> `red-apple`."""
    kept = "".join(c if c.isalnum() else " " for c in label.lower().replace("’", "").replace("'", ""))
    return "-".join(kept.split())


@cache
def _icons(style: Style) -> dict[str, Any]:
    icons: dict[str, Any] = json.loads((style.folder / "icons.json").read_text())
    return icons


@cache
def _names_by_code(style: Style) -> dict[str, str]:
    chars = style.folder / "chars.json"
    return json.loads(chars.read_text()) if chars.exists() else {}


def drawing(style: Style, record: dict[str, Any]) -> str | Path | None:
    """The SVG text (or the path of the bitmap) of one concept in one style, or None where the style lacks it."""
    code = record["hexcode"].lower()
    if style.word == "3d":
        found = [style.folder / "assets" / f"{c}.webp" for c in (code, f"{code}-fe0f")]
        return next((path for path in found if path.exists()), None)
    icons = _icons(style)
    names = _names_by_code(style)
    plain = slug(record["label"])
    candidates = [names.get(code), names.get(code.replace("-fe0f", "")), plain, plain.replace("-", "")]
    for name in filter(None, candidates):
        parent = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if icon := icons["icons"].get(parent):
            width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
            box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
            return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{icon["body"]}</svg>'
    return None


if __name__ == "__main__":
    for source in (*STYLES, NAMES):
        fetch(source)
        print(f"{source.package} {source.version} ({source.licence}) in {source.folder}")
