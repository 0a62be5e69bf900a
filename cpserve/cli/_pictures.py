"""Picture files: written with the settings inside that made them, never over another picture; read as warily as concepts."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from cpserve.cli._border import write, writing
from cpserve.errors import ConceptError
from cpserve.png import png
from cpserve.unpack import LIMITS, Picture, count_pictures, examine

ENTRIES = 10_000  # of one folder or zip to classify; they are read one at a time
MANY = replace(LIMITS, entries=ENTRIES, total_bytes=ENTRIES * LIMITS.file_bytes, caption_chars=0)
MARGIN = 2  # pixels between the pictures of a grid
NAMES, EDGE = 13, 4  # pixels: the size of a grid's names, and what is left around them


def slug(prompt: str) -> str:
    """A prompt as a part of a file name."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:40].rstrip("-_") or "picture"


def save(image: Image.Image, folder: Path, stem: str, made_by: Mapping[str, object]) -> Path:
    """Write `<stem>.png` with its settings inside; `<stem>-2.png` and so on where another picture has the name."""
    settings = _printable(made_by)
    info = PngInfo()
    for key, value in settings.items():
        info.add_itxt(key, value)
    data = png(image, info)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = next(p for p in _names(folder, stem) if _take(p) or _settings(p, settings) == settings)
        try:
            write(path, data)
        except BaseException:
            if not path.stat().st_size:
                path.unlink()
            raise
    return path


def _take(path: Path) -> bool:
    """Whether nothing had the name; now an empty file has it, so that another process looks further."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def saved(folder: Path, stem: str, made_by: Mapping[str, object]) -> bool:
    """Whether `save` has written a picture there that says this of itself."""
    settings = _printable(made_by)
    there = takewhile(Path.exists, _names(folder, stem))
    return any(_settings(path, settings) == settings for path in there)


def _printable(made_by: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value).encode("utf-8", "backslashreplace").decode() for key, value in made_by.items()}


def _names(folder: Path, stem: str) -> Generator[Path]:
    yield folder / f"{stem}.png"
    for number in count(2):
        yield folder / f"{stem}-{number}.png"


def _settings(path: Path, keys: Mapping[str, str]) -> dict[str, str | None]:
    """What a file says of those keys; nothing if it is no PNG."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return {key: image.info.get(key) for key in keys}
    except Exception:  # noqa: BLE001 - Pillow answers damage with a dozen kinds of error; the file is then somebody else's
        return {}


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size, row by row."""
    width, height = (side + MARGIN for side in images[0].size)
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * width - MARGIN, rows * height - MARGIN), "white")
    for i, image in enumerate(images):
        page.paste(image, (i % columns * width, i // columns * height))
    return page


def captioned(image: Image.Image, text: str) -> Image.Image:
    """A picture with a line below it."""
    made = Image.new("RGB", (image.width, image.height + NAMES + EDGE), "white")
    made.paste(image)
    middle = image.width / 2, (image.height + made.height) / 2
    ImageDraw.Draw(made).text(middle, text, "black", ImageFont.load_default(NAMES), anchor="mm")
    return made


def labelled(page: Image.Image, rows: Sequence[str], columns: Sequence[str] = ()) -> Image.Image:
    """A grid with its rows' names on the left and its columns' above, each in the middle of its own."""
    font = ImageFont.load_default(NAMES)
    left, top = 2 * EDGE + int(max(map(font.getlength, rows))), NAMES + 2 * EDGE if columns else 0
    made = Image.new("RGB", (left + page.width, top + page.height), "white")
    made.paste(page, (left, top))
    pen = ImageDraw.Draw(made)
    for i, name in enumerate(rows):
        pen.text((EDGE, top + (i + 0.5) * page.height / len(rows)), name, "black", font, anchor="lm")
    for i, name in enumerate(columns):
        pen.text((left + (i + 0.5) * page.width / len(columns), top / 2), name, "black", font, anchor="mm")
    return made


def read(path: Path) -> Generator[tuple[str, Picture | ConceptError]]:
    """Pictures with their paths, of a folder, a zip or a single file, and in its place the refusal of what cannot be taken."""
    try:
        whole_file = path.is_file() and path.suffix.lower() != ".zip"
    except OSError as error:
        yield str(path), _unreadable(path, error)
        return
    if not whole_file:
        for found in examine(path, MANY):
            whole = found.entry == str(path)  # what is wrong with a folder or zip itself
            yield str(path if whole else path / found.entry), found
        return
    # a folder of one: the file passes the same checks
    with tempfile.TemporaryDirectory() as folder:
        try:
            with path.open("rb") as stream:
                Path(folder, path.name.lstrip(".")).write_bytes(stream.read(LIMITS.file_bytes + 1))
        except OSError as error:
            yield str(path), _unreadable(path, error)
            return
        for found in examine(Path(folder), MANY):
            nothing = isinstance(found, ConceptError) and found.entry == folder
            yield str(path), _no_picture(path) if nothing else found


def _unreadable(path: Path, error: OSError) -> ConceptError:
    reason = f"{path} cannot be read: {error.strerror or error}"
    return ConceptError(reason, hint="check its permissions", entry=path.name, rule="readable")


def _no_picture(path: Path) -> ConceptError:
    rule = "is not a JPEG, PNG or WEBP picture"
    return ConceptError(f"{path.name!r} {rule}", hint="leave it out", entry=path.name, rule=rule)


def total(paths: Sequence[Path]) -> int:
    """About how many pictures `read` will come to, for progress."""
    return sum(count_pictures(path, MANY) for path in paths)
