"""Pictures out of a zip or a folder that nobody vouches for.

Knows containers, names and picture files, and refuses with the rule. Does not know what a concept is, and writes
nothing: no entry is ever extracted to disk.
"""

from __future__ import annotations

import io
import os
import re
import stat
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import Image, ImageOps

from cpserve.errors import ConceptError
from cpserve.manifest import folded

MIB = 1 << 20

_FORMATS = ("JPEG", "PNG", "WEBP")
_PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"})
_CLUTTER = frozenset({"desktop.ini", "thumbs.db"})
_CHUNK = 1 << 16
_NAME_BYTES = 512  # of a zip's central directory, for each entry
_REPACK = "pack the pictures again as plain files in one folder"
_CONVERT = "convert it to JPEG, PNG or WEBP, or take it out"


@dataclass(frozen=True)
class Limits:
    """How much one concept may ask of this machine; nothing beyond is read, unpacked or decoded."""

    entries: int = 200  # files, clutter not counted
    file_bytes: int = 32 * MIB  # one file, unpacked
    total_bytes: int = 256 * MIB  # all files, unpacked
    ratio: int = 200  # unpacked bytes for each packed one
    pixels: int = 50_000_000  # one picture, as stored
    side_px: int = 2048  # longer side of a picture as kept: 200 of them fit in memory, and no base model draws larger
    caption_chars: int = 1000  # 0: files of text are passed over


LIMITS = Limits()


@dataclass(frozen=True)
class Picture:
    """One picture to learn from: RGB, upright, without metadata; `entry` is its path in the zip or folder."""

    entry: str
    image: Image.Image
    caption: str | None = None


def examine(path: Path, limits: Limits) -> Generator[Picture | ConceptError]:
    """Each picture in order of names, and in its place the refusal of what cannot be taken; those of names come first.

    A generator that holds the zip open: close it when stopping early.
    """
    with ExitStack() as stack:
        try:
            listing = list(islice(_listing(path, stack, limits), limits.entries + 1))
        except FileNotFoundError:
            yield _refused(str(path), "does not exist", "give the path of a zip or a folder of pictures")
            return
        except PermissionError:
            yield _refused(str(path), "cannot be read", "check its permissions")
            return
        except Exception:  # noqa: BLE001 - zipfile answers damage with a dozen kinds of error
            yield _refused(str(path), "is neither a folder nor a zip that can be read", _REPACK)
            return
        if len(listing) > limits.entries:
            yield _refused(str(path), f"holds more than {limits.entries} files", "choose fewer of them")
            return
        if not listing:
            yield _refused(
                str(path), "holds no picture", "put a JPEG, PNG or WEBP file into it; hidden ones are passed over"
            )
        yield from _findings(sorted(listing, key=lambda entry: (entry.folded, entry.name)), limits)


def count_pictures(path: Path, limits: Limits) -> int:
    """About how many pictures `examine` will come to, by names alone; 1 for what is neither a folder nor a sound zip."""
    with ExitStack() as stack:
        try:
            return sum(1 for _ in islice(_listing(path, stack, limits), limits.entries))
        except Exception:  # noqa: BLE001 - as above
            return 1


@dataclass(frozen=True)
class _Entry:
    """A file in a zip or folder that has not been opened; `packed` is the number of bytes it takes up there."""

    name: str
    packed: int
    open: Callable[[], IO[bytes]]
    fault: tuple[str, str] | None = None  # the rule that its kind breaks, and the hint

    @property
    def folded(self) -> str:
        return folded(self.name)

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.folded).suffix

    @property
    def stem(self) -> str:
        return self.folded.removesuffix(self.suffix)

    def refused(self, rule: str, hint: str) -> ConceptError:
        return _refused(self.name, rule, hint)


def _refused(entry: str, rule: str, hint: str) -> ConceptError:
    return ConceptError(f"{entry!r} {rule}", entry=entry, rule=rule, hint=hint)


def _findings(listing: list[_Entry], limits: Limits) -> Iterator[Picture | ConceptError]:
    pictures: dict[str, _Entry] = {}  # by folded name
    texts: dict[str, _Entry] = {}  # by folded stem
    taken: set[str] = set()
    for entry in listing:
        fault = _name_fault(entry.name) or entry.fault or _type_fault(entry.suffix)
        if fault is None and entry.folded in taken:
            fault = ("has the same name as another entry but for case or Unicode form", "rename or remove one of them")
        taken.add(entry.folded)
        if fault:
            yield entry.refused(*fault)
        elif entry.suffix == ".txt":
            texts[entry.stem] = entry
        else:
            pictures[entry.folded] = entry
    stems = {picture.stem for picture in pictures.values()}
    for stem in sorted(texts.keys() - stems):
        yield texts[stem].refused("is the caption of no picture", "name it like its picture, or take it out")
    meter = _Meter(limits)
    for entry in pictures.values():
        try:
            text = texts.get(entry.stem)
            caption = None if text is None else _caption(text, meter.read(text), limits)
            yield Picture(entry.name, _decode(entry, meter.read(entry), limits), caption)
        except ConceptError as refusal:
            yield refusal


def _listing(path: Path, stack: ExitStack, limits: Limits) -> Iterator[_Entry]:
    if path.is_dir():
        entries = _folder_entries(path)
    elif path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise zipfile.BadZipFile("not an ordinary file")
    else:
        file = stack.enter_context(_FrugalFile(path, max(MIB, limits.entries * _NAME_BYTES)))
        entries = _zip_entries(stack.enter_context(zipfile.ZipFile(file)))
    return (entry for entry in entries if _name_fault(entry.name) or not _is_clutter(entry, limits))


class _FrugalFile(io.FileIO):
    """A file that gives at most `most` bytes at once: `zipfile` asks for a whole central directory, whatever its size."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(path)
        self._most = most

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self._most:
            raise zipfile.BadZipFile("central directory too large")
        return super().read(self._most if size is None or size < 0 else size)


def _zip_entries(archive: zipfile.ZipFile) -> Iterator[_Entry]:
    for info in archive.infolist():
        # `orig_filename` is what the archive says: `filename` is already cut at a NUL and has its separators replaced.
        yield _Entry(info.orig_filename, info.compress_size, partial(archive.open, info), _zip_fault(info))


def _zip_fault(info: zipfile.ZipInfo) -> tuple[str, str] | None:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
    if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
        return _kind_fault(kind)
    if info.flag_bits & 0x41:
        return "is encrypted", "pack the pictures again without a password"
    if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        return "is packed by another method than deflate", _REPACK
    return None


def _folder_entries(folder: Path) -> Iterator[_Entry]:
    closed: list[str] = []

    def complain(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        closed.append(error.filename)

    for root, folders, files in os.walk(folder, onerror=complain):
        links = [name for name in folders if Path(root, name).is_symlink()]  # named by os.walk, not followed
        for name in (*files, *links):
            path = Path(root, name)
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue  # another program took it away since it was listed
            fault = None if stat.S_ISREG(status.st_mode) else _kind_fault(stat.S_IFMT(status.st_mode))
            yield _Entry(path.relative_to(folder).as_posix(), status.st_size, partial(io.FileIO, path), fault)
    for within in map(Path, closed):
        fault = ("cannot be read", "check its permissions, or take it out")
        yield _Entry(within.relative_to(folder).as_posix(), 0, partial(io.FileIO, within), fault)


def _kind_fault(kind: int) -> tuple[str, str]:
    if kind == stat.S_IFLNK:
        return "is a symbolic link", "put the picture itself there"
    return "is not an ordinary file", _REPACK


def _name_fault(name: str) -> tuple[str, str] | None:
    if any(unicodedata.category(character) in {"Cc", "Cs"} for character in name):
        return "has control characters in its name", _REPACK
    if "\\" in name:
        return "has a backslash in its name", _REPACK
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "has an absolute name", _REPACK
    if not {"", ".", ".."}.isdisjoint(name.removesuffix("/").split("/")):
        return "has '..', '.' or an empty part in its name", _REPACK
    return None


def _type_fault(suffix: str) -> tuple[str, str] | None:
    if suffix in _ARCHIVES:
        return "is an archive within the archive", "put its pictures there instead"
    if suffix not in _PICTURES and suffix != ".txt":
        return "is not a JPEG, PNG or WEBP picture", _CONVERT
    return None


def _is_clutter(entry: _Entry, limits: Limits) -> bool:
    """Whether it is a folder's own entry, hidden, a file that desktops leave everywhere, or a text where none is wanted."""
    *folders, last = entry.name.split("/")
    text = entry.suffix == ".txt" and not limits.caption_chars
    # Thumbnails, trash, and what macOS leaves on other disks.
    hidden = any(part.startswith(".") for part in (*folders, last))
    return not last or text or hidden or "__MACOSX" in folders or last.casefold() in _CLUTTER


class _Meter:
    """Counts one concept's bytes as they stream in, whatever the archive's headers promised."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._total = 0

    def read(self, entry: _Entry) -> bytes:
        data = bytearray()
        for chunk in _chunks(entry):
            data += chunk
            self._total += len(chunk)
            if len(data) > self._limits.file_bytes:
                raise entry.refused(f"is larger than {self._limits.file_bytes} bytes", "make the picture smaller")
            if len(data) > self._limits.ratio * entry.packed:
                raise entry.refused(f"unpacks to more than {self._limits.ratio} times its size", _REPACK)
            if self._total > self._limits.total_bytes:
                raise entry.refused(
                    f"brings the whole above {self._limits.total_bytes} bytes", "take fewer or smaller pictures"
                )
        return bytes(data)


def _chunks(entry: _Entry) -> Iterator[bytes]:
    try:
        with entry.open() as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except Exception as error:
        raise entry.refused("is damaged and cannot be read", "replace the file") from error


def _caption(entry: _Entry, data: bytes, limits: Limits) -> str | None:
    """The caption in one line, or None where the file is blank."""
    try:
        caption = " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise entry.refused("is not UTF-8 text", "save it as UTF-8") from error
    if len(caption) > limits.caption_chars:
        raise entry.refused(f"is longer than {limits.caption_chars} characters", "shorten the caption")
    if any(unicodedata.category(character) == "Cc" for character in caption):
        raise entry.refused("has control characters in its text", "save it as plain text")
    return caption or None


def _decode(entry: _Entry, data: bytes, limits: Limits) -> Image.Image:
    """The first frame, upright, RGB over white, on a fresh canvas that carries no EXIF or other metadata."""
    image = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF is no concern: all of it is dropped
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
                if opened.width * opened.height <= limits.pixels:
                    image = _over_white(ImageOps.exif_transpose(opened))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        image = None
    except Exception as error:
        raise entry.refused("cannot be decoded as JPEG, PNG or WEBP", _CONVERT) from error
    if image is None:
        raise entry.refused(f"has more than {limits.pixels} pixels", "make the picture smaller")
    image.thumbnail((limits.side_px, limits.side_px))
    return image


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 instead of scaling
        image = image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    canvas = Image.new("RGB", image.size, "white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas.paste(image, mask=image)
    else:
        canvas.paste(image.convert("RGB"))
    return canvas
