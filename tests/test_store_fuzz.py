"""Fuzzing what strangers hand us: 3,000 zips and 7,500 safetensors files, each damaged or made to deceive in another way.

One law for all: taken, or refused in one line with a hint; nothing else is raised, and no file appears outside the target.
The seed is in the assertion's message: `damaged(random.Random(seed), ...)` makes the same bytes again.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from adapter_store.foreign import read_lora
from adapter_store.lora_keys import Key
from adapter_store.tensors import parse_arrays
from cpserve.concept import inspect_concept
from cpserve.errors import AdapterError

ZIPS, TENSORS, WEIGHTS = 3_000, 6_000, 1_500
NAME = "pictures/0123456789/a.png"
HOSTILE_NAMES = (
    "../../../../../../evil.png",
    "/tmp/evil.png",
    "C:/evil.png",
    "..\\..\\..\\evil.png",
    "pictures/../../../evil.png",
    "evil.png\0",
    "pictures/con.png/a/b.zip",
)
HOSTILE_VALUES = (
    -1,
    0,
    1 << 63,
    1.5,
    "F64",
    "F4",
    None,
    True,
    [],
    [0],
    [-3],
    [1 << 62, 4],
    {},
    {"a": {}},
    "\n\x1b[2J",
    [0, 1 << 40],
)


def damaged(chance: random.Random, content: bytes) -> bytes:
    """Bytes changed, cut out, doubled, put in or cut off."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        place, length = chance.randrange(len(data) or 1), chance.choice((1, 2, 4, 8, 40))
        match chance.randrange(6):
            case 0 | 1:
                data[place : place + 1] = chance.randbytes(1)
            case 2:
                data[place : place + length] = chance.choice((b"\0", b"\xff")) * length
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length]
            case 5:
                del data[place if chance.random() < 0.3 else len(data) :]
    return bytes(data)


def zipped(*names: str) -> bytes:
    """A zip of a tiny picture under each name, and a caption."""
    picture, archive = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(picture, "PNG")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        for name in names:
            made.writestr(name, picture.getvalue())
        made.writestr(names[0].replace(".png", ".txt"), b"a caption")
    return archive.getvalue()


def renamed(chance: random.Random, content: bytes) -> bytes:
    """An entry that is called otherwise in one of the places where a zip says names, or in all; its lengths stay true."""
    name = chance.choice(HOSTILE_NAMES).encode().ljust(len(NAME), b"_")[: len(NAME)]
    return content.replace(NAME.encode(), name, chance.choice((1, -1)))


def test_any_zip_is_read_or_refused_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged bytes and lying names: what is taken has a plain relative name, and no entry ever becomes a file."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    path, whole = tmp_path / "x.zip", zipped(NAME, "b.png")
    taken = refused = 0
    for seed in range(ZIPS):
        chance = random.Random(seed)
        content = renamed(chance, whole) if chance.random() < 0.3 else whole
        path.write_bytes(damaged(chance, content) if content is whole or chance.random() < 0.5 else content)
        report = inspect_concept(path)
        taken, refused = taken + bool(report.seen), refused + bool(report.refusals)
        assert report.seen or report.refusals, seed
        for seen in report.seen:
            assert not {"", ".", ".."} & set(seen.entry.split("/")), seed
            assert "\\" not in seen.entry, seed
        assert all(no.hint and no.rule and "\n" not in str(no) for no in report.refusals), seed
    assert min(taken, refused) > ZIPS // 10  # both sides of the law were tried
    assert {each.relative_to(tmp_path).as_posix() for each in tmp_path.rglob("*")} == {"x.zip", "deep", "deep/er"}
    assert not Path("/tmp/evil.png").exists()


def lora() -> bytes:
    """A small LoRA with a header of metadata."""
    noise, module = np.random.default_rng(0), "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_"
    shapes = {"A": (2, 5), "B": (4, 2), "alpha": ()}
    tensors = {
        Key(f"{module}{which}", part).kohya: np.asarray(noise.normal(size=shape), np.float32)
        for which in "kv"
        for part, shape in shapes.items()
    }
    return save(tensors, metadata={"format": "pt", "lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2})})


def reheaded(chance: random.Random, content: bytes) -> bytes:
    """The same file with one value in its header replaced, a tensor renamed, or a length that is not true."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = chance.choice(list(header))
    match chance.randrange(4):
        case 0:
            header[name] = chance.choice(HOSTILE_VALUES)
        case 1:
            header[name][chance.choice(list(header[name]))] = chance.choice(HOSTILE_VALUES)
        case 2:
            header[chance.choice(("../../x", "\n", "__metadata__", "a" * 5000))] = header.pop(name)
        case 3:
            header["more"] = header[name]
    said = json.dumps(header).encode()
    told = len(said) if chance.random() < 0.9 else chance.choice((0, 1, 1 << 40, 1 << 63, len(said) - 1))
    return told.to_bytes(8, "little") + said + body


def strange_tensors(count: int, first: int = 0) -> list[tuple[int, bytes]]:
    """So many files, each with its seed."""
    whole = lora()
    made = []
    for seed in range(first, first + count):
        chance = random.Random(seed)
        content = reheaded(chance, whole) if chance.random() < 0.5 else whole
        made.append((seed, damaged(chance, content) if content is whole or chance.random() < 0.2 else content))
    return made


def check_refusal(error: AdapterError, seed: int) -> None:
    assert error.hint, seed
    assert "\n" not in f"{error}{error.hint}", seed


def test_any_safetensors_file_is_a_lora_or_an_adapter_error() -> None:
    """What an import reads: finite float32 factors that fit each other, or one clean refusal."""
    taken = 0
    for seed, content in strange_tensors(TENSORS):
        try:
            arrays, modules = parse_arrays("x", content), read_lora("x", content).modules
        except AdapterError as error:
            check_refusal(error, seed)
            continue
        taken += 1
        assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays.values()), seed
        assert all(len(a) == b.shape[1] and np.isfinite(b).all() for a, b in modules.values()), seed
    assert TENSORS // 20 < taken < TENSORS


def test_any_safetensors_file_of_a_version_is_tensors_or_an_adapter_error() -> None:
    """What drawing reads, by torch: finite tensors, or one clean refusal."""
    torch = pytest.importorskip("torch")
    from cpserve.adapter import parse_tensors

    for seed, content in strange_tensors(WEIGHTS, first=TENSORS):
        try:
            tensors = parse_tensors("x", content)
        except AdapterError as error:
            check_refusal(error, seed)
            continue
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values()), seed
