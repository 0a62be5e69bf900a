"""Laws of `classify` over many pictures: the table outlives a kill, and the map explains the number."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from adapter_store import Store
from benchmarks.error_tables import Labels
from cpserve.adapter import Adapter
from cpserve.base import BaseModel, load_base
from cpserve.elimination import smoothed
from cpserve.engines.eager import EagerEngine
from cpserve.errors import CpserveError
from cpserve.explanation import difference, explained
from cpserve.prompts import Prompt
from cpserve.recognition import NONE, Answer, Judging, classify, draws_of, labels_of, latents_of
from tests import command
from tests.lessons import QUICK, learned

BASE = "sd21"
HEAD = b"picture,adapter,content,base,engine,draws,error,label,evaluations,seconds,dog,cat,none of these\r\n"
LABEL = HEAD.split(b",").index(b"label")


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def place(bases: dict[str, BaseModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 pictures, and a store whose adapter `pets` knows dog and cat."""
    place = tmp_path_factory.mktemp("labels")
    (place / "pictures").mkdir()
    for i in range(20):
        noise(i).save(place / "pictures" / f"{i:02d}.png")
    adapter = learned(bases[BASE], place / "runs", QUICK, "dog", "cat")
    Store(place / "store").commit("pets", adapter.files(), adapter.manifest, expected_head=0)
    return place


def run(place: Path, folders: dict[str, Path], *args: object, code: int = 0, pictures: Path | None = None) -> str:
    where = ("--adapter", "pets", "--draws", 2, "--store", place / "store", "--base", folders[BASE])
    return command.run("classify", pictures or place / "pictures", *where, *args, code=code).stderr


def assert_alike(one: bytes, other: bytes) -> None:
    """Equal but for a batch's rounding in the probabilities."""
    for row, wanted in zip(*(list(csv.reader(io.StringIO(t.decode()))) for t in (one, other)), strict=True):
        assert row[: LABEL + 2] == wanted[: LABEL + 2]
        assert row[:1] == ["picture"] or np.allclose(*(np.float64(r[LABEL + 3 :]) for r in (row, wanted)), atol=1e-3)


def test_a_stopped_table_goes_on(place: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """Cut anywhere, within a row too, and resumed, the table says what a straight run's does; whole rows are not judged again."""
    table = tmp_path / "sub" / "labels.csv"
    run(place, folders, "--out", table)
    straight = table.read_bytes()
    rows = straight.splitlines(keepends=True)
    for cut in (len(rows[0]), len(straight) // 2, len(straight) - 1, len(straight)):
        table.write_bytes(straight[:cut])
        run(place, folders, "--out", table, "--resume")
        assert_alike(table.read_bytes(), straight)
    before, _, after = rows[1].partition(b",0.02,")
    forged = before + b",0.02," + after.replace(b"0.", b"7.")
    table.write_bytes(rows[0] + forged)
    run(place, folders, "--out", table, "--resume")
    assert table.read_bytes().splitlines(keepends=True)[1] == forged


def test_a_table_is_never_lost(place: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """One that is there is not written over unasked, nor mixed with what another version said or what was judged otherwise."""
    table = tmp_path / "labels.csv"
    version = Store(place / "store").version("pets")
    content = Adapter.read(version.manifest, version.read).content_hash[:12]
    base = load_base(str(folders[BASE])).spec.entry.fingerprint.weights[:12]
    right = ["a.png", "pets@v1", content, base, "eager float32 slopes", "2", "0.02"]
    wrong = {1: "pets@v9", 2: "0" * 12, 3: "0" * 12, 4: "openvino bfloat16", 5: "4", 6: "0.05"}
    rows = [right, *([*right[:i], value, *right[i + 1 :]] for i, value in wrong.items())]
    ours, *others = [HEAD + f"{','.join(row)},dog,4,0.100,1.000000,0.000000,0.000000\r\n".encode() for row in rows]
    for said in (b"mine\r\n", *others):
        table.write_bytes(said)
        assert "--resume" in run(place, folders, "--out", table, code=1)
        assert "no table of what pets@v1 (" in run(place, folders, "--out", table, "--resume", code=1)
        assert table.read_bytes() == said
    table.write_bytes(ours)
    with FileLock(tmp_path / ".labels.csv.lock"):
        assert "another process writes" in run(place, folders, "--out", table, "--resume", code=1)
    assert table.read_bytes() == ours
    assert "no table of what pets@v1 (" in run(place, folders, "--out", table, "--resume", "--known-only", code=1)
    run(place, folders, "--out", table, "--resume")
    assert table.read_bytes().startswith(ours)
    assert [p.name for p in tmp_path.iterdir()] == ["labels.csv"]
    run(place, folders, "--resume", code=2)


def test_what_it_writes_is_no_picture_to_classify(place: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """Table and explanations may lie among the pictures; a later run judges only these, and explains those in the table, too."""
    pictures = shutil.copytree(place / "pictures", tmp_path / "pictures")
    (pictures / "00.txt").write_bytes(b"\xff is a camera's note and no caption")
    table, why = pictures / "labels.csv", pictures / "why"
    run(place, folders, "--out", table, pictures=pictures)
    for _ in range(2):
        run(place, folders, "--out", table, "--resume", "--explain", why, pictures=pictures)
    assert table.read_bytes().count(b"\r\n") == 21
    assert {p.name for p in why.iterdir()} == {f"{i:02d}.png" for i in range(20)}
    for above in (pictures, pictures.parent):
        assert "a folder of its own" in run(place, folders, "--explain", above, pictures=pictures, code=2)


def test_what_was_judged_is_kept_when_its_explanation_fails(
    place: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are written before, for they cost the most."""

    def full(*_: object) -> None:
        raise CpserveError("the disk is full", hint="free some space")

    monkeypatch.setattr("cpserve.cli._pictures.write", full)
    said = run(place, folders, "--out", tmp_path / "labels.csv", "--explain", tmp_path / "why", code=1)
    assert "the disk is full" in said
    assert (tmp_path / "labels.csv").read_bytes().count(b"\r\n") == 17


def test_what_cannot_be_read_is_refused_and_the_rest_judged(
    place: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder within the folder, a file of words, or a name too long for the disk: exit code 1, and rows for all others."""
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        noise(1).save(tmp_path / "in" / name / "1.png")
    (tmp_path / "notes.md").write_text("no picture")
    scandir = os.scandir

    def closed(folder: str) -> Iterator[os.DirEntry[str]]:  # the administrator may read what is closed to others
        if folder == str(tmp_path / "in" / "b"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr("os.scandir", closed)
    odd = [tmp_path / "in", tmp_path / "notes.md", tmp_path / ("x" * 300)]
    said = run(place, folders, *odd, "--out", tmp_path / "labels.csv", code=1)
    assert said.count("refused: ") == 3
    assert "'b' cannot be read" in said
    assert "'notes.md' is not a JPEG, PNG or WEBP picture" in said
    assert (tmp_path / "labels.csv").read_bytes().count(b"\r\n") == 22


def test_the_map_is_the_difference_where_either_label_gains(bases: dict[str, BaseModel], tmp_path: Path) -> None:
    """It is that of the labels' errors, or nothing where c_0 is better than both; with the labels swapped it changes its sign."""
    adapter = learned(bases[BASE], tmp_path, replace(QUICK, method="none", factor_rate=1e-2), "dog", "cat")
    judging = Judging(draws=4, error=0)
    with EagerEngine(bases[BASE]) as engine:
        [answer] = classify(engine, [noise(1)], adapter, judging)
        labels = Labels.of(engine, [Prompt(text, adapter) for text in labels_of(adapter, judging).values()])
        [latent] = latents_of(engine, [noise(1)])
        dog, cat, generic = labels.maps(latent, draws_of(engine, judging, latent[None])).mean(0)
        cells = difference(engine, noise(1), adapter, ("dog", "cat"), judging)
        turned = difference(engine, noise(1), adapter, ("cat", "dog"), judging)
        against = difference(engine, noise(1), adapter, ("dog", NONE), judging)
    assert cells.shape == (8, 8)
    assert np.allclose(cells, -turned, atol=1e-4)
    for found, other in ((cells, cat), (against, generic)):
        gains = smoothed(generic - np.stack([dog, other])).max(0) > 0
        assert np.allclose(found, np.where(gains, other - dog, 0), atol=1e-3)
    assert explained(noise(1), answer, against, NONE).size == (512, 276)


def test_blue_speaks_for_the_label_and_orange_for_the_next() -> None:
    """On a grey picture, the half of the map above zero turns bluer than red, and the other half redder."""
    answer = Answer("dog", 0.9, {"dog": 0.9, "cat": 0.1}, 4, 0.1)
    cells = np.array([[1.0, 1.0, -1.0, -1.0]] * 4)
    page = np.asarray(explained(Image.new("RGB", (64, 64), "grey"), answer, cells, "cat"), dtype=int)
    for x, sign in ((276, 1), (492, -1)):
        red, _, blue = page[128, x]
        assert (blue - red) * sign > 20


def test_an_explanation_for_every_picture(place: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """`--explain` writes a picture each; asked again it makes only those that are missing, or were of another adapter or way."""
    why = tmp_path / "why"
    run(place, folders, "--explain", why)
    first = {p.name: p.stat().st_ino for p in why.iterdir()}
    assert {*first} == {f"{i:02d}.png" for i in range(20)}
    (why / "03.png").unlink()
    noise(1).save(why / "05.png")
    run(place, folders, "--explain", why)
    second = {p.name: p.stat().st_ino for p in why.iterdir()}
    assert {*second} == {*first, "05-2.png"}
    assert all(second[name] == first[name] for name in first if name not in {"03.png", "05.png"})


def test_where_every_picture_is_known_none_is_no_answer(place: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """The table of `--known-only` has no column for it, and the other probabilities sum to one."""
    table = tmp_path / "labels.csv"
    said = run(place, folders, "--known-only", "--out", table)
    assert "it is a guess" in said  # odds were fitted on another base
    head, *rows = csv.reader(io.StringIO(table.read_text()))
    assert head[LABEL:] == ["label", "evaluations", "seconds", "dog", "cat"]
    assert {row[LABEL] for row in rows} <= {"dog", "cat"}
    assert all(float(row[-1]) + float(row[-2]) == pytest.approx(1, abs=2e-6) for row in rows)
