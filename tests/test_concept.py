"""Laws of what users hand us: everything is hostile until read, and every refusal names the entry and the rule."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zipfile
import zlib
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cpserve.concept import Limits, inspect_concept, read_concept
from cpserve.errors import ConceptError, RefError
from cpserve.unpack import count_pictures, examine

LAW = settings(max_examples=300)


def encode(color="red", size=(80, 80), kind="PNG", mode="RGB", **save):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, kind, **save)
    return buffer.getvalue()


PNG = encode()


def striped(seed, size=(96, 96)):
    """A picture with enough structure for an average hash; other seeds look otherwise."""
    levels = np.random.default_rng(seed).choice(np.uint8([40, 210]), (8, 8))
    image = Image.fromarray(levels).resize(size, Image.Resampling.NEAREST)
    return image.convert("RGB")


def pack(path, entries, **options):
    """Write a zip of (name or ZipInfo, bytes), duplicates and all."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        warnings.simplefilter("ignore", UserWarning)
        for name, data in entries:
            archive.writestr(name, data, compress_type=zipfile.ZIP_DEFLATED)
    return path


def refusals(path, **limits):
    """All refusals, after checking that reading stops at the first of them and that each can help somebody."""
    report = inspect_concept(path, limits=Limits(**limits))
    if report.refusals:
        with pytest.raises(ConceptError) as caught:
            read_concept(path, name="x", limits=Limits(**limits))
        assert str(caught.value) == str(report.refusals[0])
    for refusal in report.refusals:
        assert refusal.hint
        assert refusal.rule in str(refusal)
        assert repr(refusal.entry) in str(refusal)
    return {refusal.entry: refusal.rule for refusal in report.refusals}


def test_a_folder_and_its_zip_are_the_same_concept(tmp_path):
    """The container does not matter: same pictures, order, captions and name."""
    folder = tmp_path / "Dog"
    (folder / "more").mkdir(parents=True)
    files = {
        "b.png": PNG,
        "a.JPG": encode("blue", kind="JPEG"),
        "a.txt": "\ufeffa  dog\n on grass\n".encode(),
        "more/c.webp": encode("green", kind="WEBP", lossless=True),
        ".DS_Store": b"junk",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    archive = pack(tmp_path / "Dog.zip", [*reversed(files.items()), ("__MACOSX/._a.JPG", b"x"), ("more/", b"")])

    one, two = read_concept(folder, class_word="animal"), read_concept(archive, class_word="animal")

    assert one.name == two.name == "dog"
    assert one.class_word == two.class_word == "animal"
    assert one.captions == two.captions == ("a dog on grass", None, None)
    assert [p.entry for p in one.pictures] == [p.entry for p in two.pictures] == ["a.JPG", "b.png", "more/c.webp"]
    assert [p.image.tobytes() for p in one.pictures] == [p.image.tobytes() for p in two.pictures]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("/etc/a.png", "absolute"),
        ("C:/a.png", "absolute"),
        ("c:a.png", "absolute"),
        ("../a.png", "'..'"),
        ("x/../../a.png", "'..'"),
        ("x//a.png", "'..'"),
        ("./a.png", "'..'"),
        ("../", "'..'"),
        ("__MACOSX/../../.DS_Store", "'..'"),
        ("x\\a.png", "backslash"),
        ("a.png\x00.exe", "control"),
        ("a\x1b[2J.png", "control"),
        ("inner.zip", "archive within"),
        ("inner.tar.GZ", "archive within"),
        ("notes.pdf", "not a JPEG"),
        ("a", "not a JPEG"),
        ("alone.txt", "caption of no picture"),
    ],
)
def test_a_hostile_name_is_refused_not_repaired(tmp_path, name, rule):
    """A name that could leave a folder, hide its end, nest an archive or is no picture is refused, with its rule."""
    info = zipfile.ZipInfo("placeholder")
    info.filename = name  # the constructor would cut it at a NUL
    found = refusals(pack(tmp_path / "x.zip", [("ok.png", PNG), (info, PNG)]))
    assert list(found) == [name]
    assert rule in found[name]


@pytest.mark.parametrize("twin", ["DOG.png", "dog.png"])
def test_two_names_that_one_file_system_would_merge_are_refused(tmp_path, twin):
    """Names that are equal after case folding are duplicates."""
    assert "same name" in refusals(pack(tmp_path / "x.zip", [("dog.png", PNG), (twin, PNG)])).popitem()[1]


def test_unicode_forms_of_one_name_are_duplicates(tmp_path):
    """Names that are equal after NFC are duplicates."""
    found = refusals(pack(tmp_path / "x.zip", [("caf\u00e9.png", PNG), ("cafe\u0301.png", PNG)]))
    assert "same name" in found.popitem()[1]


@pytest.mark.parametrize(("kind", "rule"), [(stat.S_IFLNK, "symbolic link"), (stat.S_IFIFO, "not an ordinary file")])
def test_links_and_devices_in_a_zip_are_refused(tmp_path, kind, rule):
    """Only ordinary files are taken."""
    info = zipfile.ZipInfo("a.png")
    info.external_attr = (kind | 0o777) << 16
    assert rule in refusals(pack(tmp_path / "x.zip", [(info, b"/etc/passwd")]))["a.png"]


def test_links_and_pipes_in_a_folder_are_refused(tmp_path):
    """A folder is not left through a link, to a file or to a folder, and a pipe is never opened."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(PNG)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").symlink_to(outside / "secret.png")
    (folder / "deep").symlink_to(outside)
    os.mkfifo(folder / "pipe.png")
    found = refusals(folder)
    assert {name: rule.removeprefix("is ") for name, rule in found.items()} == {
        "a.png": "a symbolic link",
        "deep": "a symbolic link",
        "pipe.png": "not an ordinary file",
    }


def test_encrypted_and_exotic_entries_are_refused(tmp_path):
    """An entry with a password, or packed by LZMA, is refused before it is opened."""
    locked = pack(tmp_path / "locked.zip", [("a.png", PNG)])
    data = bytearray(locked.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    locked.write_bytes(data)
    assert "encrypted" in refusals(locked)["a.png"]
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", PNG)
    assert "deflate" in refusals(tmp_path / "lzma.zip")["a.png"]


def test_caps_hold_on_bytes_that_arrive_not_on_bytes_promised(tmp_path):
    """Entries, file size, total size and ratio are capped, and a false size in the header does not help."""
    three = pack(tmp_path / "x.zip", [(f"{i}.png", os.urandom(5000)) for i in range(3)])
    assert "more than 2 files" in refusals(three, entries=2)[str(three)]
    assert "larger than 4000" in refusals(three, file_bytes=4000)["0.png"]
    above = refusals(three, total_bytes=9999)
    assert "above 9999" in above["1.png"]
    assert "above 9999" in above["2.png"]
    bomb = pack(tmp_path / "bomb.zip", [("a.png", bytes(1 << 20))])
    assert "200 times" in refusals(bomb)["a.png"]
    data = bytearray(bomb.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        struct.pack_into("<I", data, data.index(signature) + offset, 100)
    bomb.write_bytes(data)
    assert "damaged" in refusals(bomb)["a.png"]


def test_a_huge_central_directory_is_not_read(tmp_path):
    """A zip of twenty thousand empty entries is refused without listing them."""
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(20_000):
            archive.writestr(zipfile.ZipInfo(f"{number:040}.png"), b"")
    assert "neither a folder nor a zip" in refusals(path)[str(path)]


def test_clutter_does_not_count(tmp_path):
    """What macOS, Windows and Android leave behind is ignored, not counted, never opened."""
    clutter = [(f"__MACOSX/._{i}.png", b"x") for i in range(20)]
    path = pack(
        tmp_path / "x.zip",
        [
            ("a.png", PNG),
            *clutter,
            *((name, b"") for name in ("d/.DS_Store", "Thumbs.db", "Desktop.ini", "d/", "._a.png")),
            *((name, PNG) for name in (".trashed-1700000000-b.png", ".thumbnails/c.png")),
        ],
    )
    assert refusals(path, entries=1) == {}


def test_the_check_command_names_every_refusal(tmp_path):
    """Inspection goes on after a refusal: all of them are listed and the good pictures are still seen."""
    path = pack(
        tmp_path / "x.zip",
        [("ok.png", PNG), ("../a.png", PNG), ("b.gif", PNG), ("c.png", b"no"), ("ok.txt", b"\xff"), ("d.jpg", PNG)],
    )
    report = inspect_concept(path)
    assert [refusal.entry for refusal in report.refusals] == ["../a.png", "b.gif", "c.png", "ok.txt"]
    assert [seen.entry for seen in report.seen] == ["d.jpg"]


def test_notes_tell_small_pictures_and_near_duplicates(tmp_path):
    """A tiny picture and a recompressed, resized copy are noted; other pictures are not, flat ones included."""
    first, other = striped(0), striped(40)
    buffers = {"b.jpg": io.BytesIO(), "a.png": io.BytesIO(), "c.png": io.BytesIO()}
    first.save(buffers["a.png"], "PNG")
    first.resize((60, 60)).save(buffers["b.jpg"], "JPEG", quality=70)
    other.save(buffers["c.png"], "PNG")
    files = [(name, buffer.getvalue()) for name, buffer in buffers.items()]
    report = inspect_concept(
        pack(tmp_path / "x.zip", [*files, ("flat1.png", encode("black")), ("flat2.png", encode("white"))])
    )
    assert {seen.entry: seen.notes for seen in report.seen} == {
        "a.png": (),
        "b.jpg": ("smaller than 64 px", "near-duplicate of a.png"),
        "c.png": (),
        "flat1.png": (),
        "flat2.png": (),
    }


def test_pictures_are_upright_rgb_over_white_first_frame_and_bare(tmp_path):
    """EXIF turns the picture and is dropped, transparency shows white, an animation gives its first frame."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    exif[0x010F] = "camera"
    animation = io.BytesIO()
    frames = [Image.new("RGB", (70, 70), color) for color in ("red", "blue")]
    frames[0].save(animation, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(encode("red", (90, 70), "JPEG", exif=exif))
    (folder / "2.png").write_bytes(encode((255, 0, 0, 0), mode="RGBA"))
    (folder / "3.webp").write_bytes(animation.getvalue())
    (folder / "4.png").write_bytes(encode(0x8000, mode="I;16"))
    (folder / "5.png").write_bytes(encode(0, mode="P", transparency=0))
    (folder / "6.png").write_bytes(encode((10, 128), mode="LA"))
    images = [picture.image for picture in read_concept(folder).pictures]
    assert all(image.mode == "RGB" and not image.info and not image.getexif() for image in images)
    assert images[0].size == (70, 90)
    assert [image.getpixel((5, 5)) for image in images[1:]] == [
        (255, 255, 255),
        (255, 0, 0),
        (128, 128, 128),
        (255, 255, 255),
        (132, 132, 132),
    ]


def test_pixel_bombs_are_refused_before_they_are_decoded(tmp_path):
    """A picture above the pixel cap is refused, at Pillow's own warning too; one with a long side is shrunk."""
    path = pack(tmp_path / "x.zip", [("a.png", encode(size=(100, 101)))])
    assert "more than 10000 pixels" in refusals(path, pixels=10_000)["a.png"]
    assert read_concept(path, limits=Limits(side_px=50)).pictures[0].image.size == (50, 50)
    bomb = bytearray(PNG)
    struct.pack_into(">II", bomb, 16, 10_000, 10_000)
    struct.pack_into(">I", bomb, 29, zlib.crc32(bomb[12:29]))
    assert "pixels" in refusals(pack(tmp_path / "bomb.zip", [("a.png", bomb)]))["a.png"]


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_the_content_decides_what_a_picture_is(tmp_path, kind):
    """Another format under an allowed suffix never reaches its decoder."""
    (tmp_path / "a.png").write_bytes(encode(kind=kind))
    assert "cannot be decoded" in refusals(tmp_path)["a.png"]


@pytest.mark.parametrize(
    ("text", "rule"), [(b"x" * 1001, "longer"), (b"\xff\xfe", "UTF-8"), (b"a\x00b", "control characters")]
)
def test_captions_are_short_plain_utf8(tmp_path, text, rule):
    """A caption that is too long, not UTF-8 or has control characters is refused; a blank one is none."""
    assert rule in refusals(pack(tmp_path / "x.zip", [("a.png", PNG), ("a.txt", text)]))["a.txt"]
    assert read_concept(pack(tmp_path / "y.zip", [("a.png", PNG), ("A.txt", b" \n")])).captions == (None,)


def test_there_is_at_least_one_picture(tmp_path):
    """An empty folder, a missing path, a file that is no zip and a pipe are refused in words."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "empty").mkdir()
    (tmp_path / "dog.jpg").write_bytes(PNG)
    for name, rule in [
        ("empty", "holds no picture"),
        ("missing.zip", "does not exist"),
        ("dog.jpg", "neither"),
        ("pipe", "neither"),
    ]:
        assert rule in refusals(tmp_path / name)[str(tmp_path / name)]


def test_a_link_is_called_by_its_own_name(tmp_path):
    """The file's name is the concept's, wherever the file lies."""
    pack(tmp_path / "IMG 1.zip", [("a.png", PNG)])
    (tmp_path / "cat.zip").symlink_to("IMG 1.zip")
    assert read_concept(tmp_path / "cat.zip").name == "cat"


def test_a_name_is_checked_before_anything_is_read(tmp_path):
    """The default name is the stem in lower case, and a stem that cannot be a name asks for one."""
    path = pack(tmp_path / "My Dog.zip", [("a.png", PNG)])
    with pytest.raises(RefError):
        read_concept(path)
    assert read_concept(path, name="my-dog").name == "my-dog"


parts = st.one_of(
    st.sampled_from(["..", ".", "", "a", "A", "a.png", "C:", "__MACOSX", ".DS_Store", "con", "\x00", "a\\b"]),
    st.text(max_size=6).filter(lambda text: "/" not in text),
)


@LAW
@given(names=st.lists(st.lists(parts, min_size=1, max_size=4).map("/".join), min_size=1, max_size=5))
def test_whatever_the_names_reading_takes_plain_ones_or_refuses(tmp_path_factory, names):
    """For any member names: every entry that is taken has a plain relative name, all else is a ConceptError."""
    infos = []
    for name in names:
        info = zipfile.ZipInfo()
        info.filename = name
        infos.append((info, PNG))
    path = tmp_path_factory.mktemp("names") / "x.zip"
    pack(path, infos)
    report = inspect_concept(path)
    for seen in report.seen:
        assert not set(seen.entry.split("/")) & {"", ".", ".."}
        assert "\\" not in seen.entry
        assert seen.entry.casefold().endswith((".png", ".jpg", ".jpeg", ".webp"))
    assert all(isinstance(refusal, ConceptError) and refusal.hint for refusal in report.refusals)


@LAW
@given(data=st.data())
def test_damaged_zips_raise_nothing_but_a_concept_error(tmp_path_factory, data):
    """For any flipped bytes and any cut: a concept or a ConceptError, never another exception."""
    path = tmp_path_factory.mktemp("fuzz") / "x.zip"
    pack(
        path,
        [("a.jpg", encode(size=(8, 8), kind="JPEG")), ("b.webp", encode(size=(8, 8), kind="WEBP")), ("b.txt", b"b")],
    )
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(len(damaged) // 2, len(damaged)) | st.just(len(damaged)))])
    report = inspect_concept(path)
    assert report.seen or report.refusals


@LAW
@given(
    damage=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
    kind=st.sampled_from(["PNG", "JPEG", "WEBP"]),
)
def test_damaged_pictures_raise_nothing_but_a_concept_error(tmp_path_factory, damage, kind):
    """For any damage to a picture's bytes: a picture or a ConceptError, never another exception."""
    picture = bytearray(encode(size=(16, 16), kind=kind, exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x00\x00"))
    for place, value in damage:
        picture[place % len(picture)] = value
    folder = tmp_path_factory.mktemp("damage")
    (folder / "a.png").write_bytes(picture)
    report = inspect_concept(folder)
    assert len(report.seen) + len(report.refusals) == 1


@LAW
@given(noise=st.binary(max_size=300))
def test_noise_is_not_a_zip(tmp_path_factory, noise):
    """Any bytes at all are refused in words."""
    path = tmp_path_factory.mktemp("noise") / "x.zip"
    path.write_bytes(b"PK\x03\x04" + noise)
    assert inspect_concept(path).refusals


def test_many_pictures_with_long_names_are_listed(tmp_path):
    """What a directory of names may take up grows with the number of entries that are allowed."""
    many = pack(tmp_path / "many.zip", [(f"{'holiday/' * 45}{i}.png", PNG) for i in range(3000)])
    assert count_pictures(many, Limits(entries=10_000)) == 3000
    with closing(examine(many, Limits())) as findings:
        assert "neither a folder nor a zip" in str(next(findings))
