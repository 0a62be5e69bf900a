"""A concept: pictures, the words that go with them, and a name.

Knows what the user hands over. Does not know how a zip is read safely (`unpack.py`) or what training makes of it.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cpserve.errors import ConceptError, RefError
from cpserve.manifest import check_name
from cpserve.unpack import LIMITS, Limits, Picture, examine

__all__ = ["LIMITS", "SMALL_PX", "Concept", "Limits", "Picture", "Report", "Seen", "inspect_concept", "read_concept"]

SMALL_PX = 64  # below this a picture has less detail than the smallest base model draws


@dataclass(frozen=True)
class Concept:
    """A name, at least one picture of it, and the word for its class ("dog") where the user knows one."""

    name: str
    pictures: tuple[Picture, ...]
    class_word: str | None = None

    @property
    def captions(self) -> tuple[str | None, ...]:
        """Each picture's own words, in the order of the pictures."""
        return tuple(picture.caption for picture in self.pictures)


@dataclass(frozen=True)
class Seen:
    """A picture as training would see it: `size` is width and height in pixels, `notes` what may make it a poor one."""

    entry: str
    size: tuple[int, int]
    caption: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What training would see and everything that it would refuse; it starts only when nothing is refused."""

    seen: tuple[Seen, ...]
    refusals: tuple[ConceptError, ...]


def read_concept(
    path: Path, *, name: str | None = None, class_word: str | None = None, limits: Limits = LIMITS
) -> Concept:
    """Read a zip or a folder of JPEG, PNG and WEBP pictures, in order of their names.

    A `.txt` with a picture's stem is its caption. The name defaults to the file's stem in lower case.

    Raises:
        ConceptError: an entry breaks a rule, or there is no picture.
        RefError: the name cannot be one.
    """
    name = name_of(path) if name is None else check_name(name)
    pictures = []
    with closing(examine(path, limits)) as findings:
        for finding in findings:
            if isinstance(finding, ConceptError):
                raise finding
            pictures.append(finding)
    return Concept(name, tuple(pictures), class_word)


def name_of(path: Path) -> str:
    """The name of the concept in a zip or folder: its file name's stem in lower case.

    Raises:
        RefError: that cannot be one.
    """
    whole = path.absolute()  # a link's own name, not what it leads to
    try:
        return check_name((whole.name if whole.is_dir() else whole.stem).lower())
    except RefError as error:
        raise RefError(str(error), ref=error.ref, hint="rename the file, or train with a --name") from error


def inspect_concept(path: Path, *, limits: Limits = LIMITS) -> Report:
    """What `read_concept` would see and all that it would refuse; raises nothing for what it finds."""
    seen: list[Seen] = []
    refusals: list[ConceptError] = []
    hashes: dict[str, tuple[int, int]] = {}
    for finding in examine(path, limits):
        if isinstance(finding, ConceptError):
            refusals.append(finding)
            continue
        tiny = _average_hash(finding.image)
        notes = [f"smaller than {SMALL_PX} px"] if min(finding.image.size) < SMALL_PX else []
        notes += [f"near-duplicate of {twin}" for twin, other in hashes.items() if _near(tiny, other)][:1]
        hashes[finding.entry] = tiny
        seen.append(Seen(finding.entry, finding.image.size, finding.caption, tuple(notes)))
    return Report(tuple(seen), tuple(refusals))


def _average_hash(image: Image.Image) -> tuple[int, int]:
    """64 bits, which eighths of the picture are brighter than its mean, and the mean (0-255)."""
    levels = image.convert("L").resize((8, 8), Image.Resampling.BOX).tobytes()
    mean = sum(levels) // len(levels)
    return sum((level > mean) << bit for bit, level in enumerate(levels)), mean


def _near(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two hashes differ as little as after a resize or a recompression; the mean tells flat pictures apart."""
    return (a[0] ^ b[0]).bit_count() <= 3 and abs(a[1] - b[1]) <= 8
