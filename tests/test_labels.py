"""Laws of `classify` over many pictures: the table outlives a kill, and the map explains the number."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from adapter_store import Store
from benchmarks.error_tables import Labels
from cpserve.base import BaseModel
from cpserve.cli import main
from cpserve.elimination import smoothed
from cpserve.engines.eager import EagerEngine
from cpserve.explanation import difference, explained
from cpserve.prompts import Prompt
from cpserve.recognition import NONE, Judging, classify, draws_of, labels_of, latents_of
from tests.lessons import QUICK, learned

BASE = "sd21"
HEAD = b"picture,adapter,draws,error,label,evaluations,seconds,dog,cat,none of these\r\n"


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


def run(place: Path, folders: dict[str, Path], *args: object, code: int = 0) -> str:
    where = ("--adapter", "pets", "--draws", 2, "--store", place / "store", "--base", folders[BASE])
    result = CliRunner().invoke(main, ["classify", *(str(a) for a in (place / "pictures", *where, *args))])
    assert result.exit_code == code, result.output
    return result.stderr


def assert_alike(one: bytes, other: bytes) -> None:
    """Equal but for a batch's rounding in the probabilities."""
    for row, wanted in zip(*(list(csv.reader(io.StringIO(t.decode()))) for t in (one, other)), strict=True):
        assert row[:6] == wanted[:6]
        assert row[:1] == ["picture"] or np.allclose(np.float64(row[7:]), np.float64(wanted[7:]), atol=1e-3)


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
    forged = rows[1].replace(b",0.02,", b",1e-2,").replace(b"0.", b"7.").replace(b",1e-2,", b",0.02,")
    table.write_bytes(rows[0] + forged)
    run(place, folders, "--out", table, "--resume")
    assert table.read_bytes().splitlines(keepends=True)[1] == forged


def test_a_table_is_never_lost(place: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """One that is there is not written over unasked, nor mixed with what another version said or what was judged otherwise."""
    table = tmp_path / "labels.csv"
    for content in (
        b"mine\r\n",
        HEAD + b"a.png,pets@v9,2,0.02,dog,4,0.1,1,0,0\r\n",
        HEAD + b"a.png,pets@v1,4,0.02,dog,4,0.1,1,0,0\r\n",
        HEAD + b"a.png,pets@v1,2,0.05,dog,4,0.1,1,0,0\r\n",
    ):
        table.write_bytes(content)
        assert "--resume" in run(place, folders, "--out", table, code=1)
        assert "no table of what pets@v1 said" in run(place, folders, "--out", table, "--resume", code=1)
        assert table.read_bytes() == content
    run(place, folders, "--resume", code=2)


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


def test_an_explanation_for_every_picture(place: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """`--explain` writes a picture each, made anew without another copy when asked again."""
    for _ in range(2):
        run(place, folders, "--explain", tmp_path / "why")
        assert {p.name for p in (tmp_path / "why").iterdir()} == {f"{i:02d}.png" for i in range(20)}
