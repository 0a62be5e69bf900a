"""`cpserve export` and `cpserve doctor` say what would be built, refuse what cannot be, and show what runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from cpserve.base import BaseModel
from cpserve.bundle import MergedEntry, read_manifest
from tests.command import run
from tests.retarget import openvino, retarget


@pytest.mark.parametrize(
    "wrong",
    [
        "--out b",
        "--onnx --openvino --out b",
        "--onnx",
        "--openvino --precision int4 --out b",
        "--openvino --batch 1:x --out b",
        "--openvino --batch 0 --out b",
        "--openvino --sizes 64,, --out b",
        "--onnx --gpu sm86 --out b",
        "--trt --gpu sm42 --out b",
        "--onnx --merge style.safetensors:much --out b",
        "--onnx --merge style.safetensors:nan --out b",
    ],
)
def test_a_wrong_option_exits_2(wrong: str) -> None:
    """Usage errors never load a model."""
    assert "Usage: " in run("export", *wrong.split(), code=2).stderr


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ("--onnx --batch 2", "every batch"),
        ("--onnx --precision bf16", "no bf16"),
        ("--onnx --merge missing.safetensors:0.5", "no LoRA's .safetensors file"),
        ("--openvino --sizes 65", "65 pixels cannot be drawn"),
        ("--openvino --sizes 32 --slopes", "slopes are of 16 by 16 pixels"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(
    folders: dict[str, Path], tmp_path: Path, refused: str, words: str
) -> None:
    """A refusal exits 1 with a sentence and the way out, and writes nothing."""
    if "--openvino" in refused:
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
    result = run("export", *refused.split(), "--out", tmp_path / "b", "--base", folders["sd21"], code=1)
    assert words in result.stderr
    assert "hint: " in result.stderr
    assert not any(tmp_path.iterdir())


def test_a_dry_run_tells_files_bytes_and_time(folders: dict[str, Path], tmp_path: Path) -> None:
    """What would be built, for whom and in which shapes, is told before, and nothing is written."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    shapes = ("--batch", "2:8", "--sizes", "32,16", "--precision", "fp32")
    command = ("export", "--openvino", *shapes, "--out", tmp_path / "b", "--base", folders["sd21"], "--dry-run")
    told = json.loads(run(*command, "--json").stdout)
    assert (told["runner"], told["precision"], told["rows"], told["sizes"]) == ("openvino", "float32", [2, 8], [16, 32])
    assert told["bytes"] == sum(f["bytes"] for f in told["files"]) > 0
    assert told["seconds"] > 0
    assert "unet.onnx" in run(*command).stdout
    assert not any(tmp_path.iterdir())


def test_slopes_are_one_graph_more(folders: dict[str, Path], tmp_path: Path) -> None:
    """`--slopes` adds the slope's graph to the bundle, and the time that it takes, and nothing else."""
    command = ("export", "--onnx", "--out", tmp_path / "b", "--base", folders["sd21"], "--dry-run", "--json")
    plain, more = (json.loads(run(*command, *option).stdout) for option in ((), ("--slopes",)))
    named = [[f["name"] for f in told["files"]] for told in (plain, more)]
    assert sorted(named[1]) == sorted([*named[0], "kv_slope.onnx"])
    assert more["seconds"] > plain["seconds"]
    assert not any(tmp_path.iterdir())


def test_doctor_shows_what_runs_a_bundle(bases: dict[str, BaseModel], bundles: dict[str, Path], tmp_path: Path) -> None:
    """The engine that a bundle's manifest chooses, the precision that it really computes in, and a measured time."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    target = openvino(bases["sd21"])
    bundle = retarget(bases["sd21"], bundles["sd21"], tmp_path / "bundle", replace(target, sizes=target.sizes[1:]))
    told = json.loads(run("doctor", "--bundle", bundle, "--threads", 1, "--json", "--store", tmp_path).stdout)
    assert told["bundle"]["engine"] == "openvino"
    assert told["bundle"]["precision"] == "float32"
    assert told["bundle"]["ms_a_step"] > 0
    assert "float32" in told["engine"]["openvino"]


def test_pictures_are_drawn_by_the_bundles_engine(
    bases: dict[str, BaseModel], bundles: dict[str, Path], tmp_path: Path
) -> None:
    """`generate --bundle` draws with what the bundle was made for, and says so beside the picture."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    bundle = retarget(bases["sd21"], bundles["sd21"], tmp_path / "bundle", openvino(bases["sd21"]))
    command = ("generate", "a dog", "-n", 1, "--steps", 2, "--bundle", bundle, "--out", tmp_path / "out", "--json")
    told = json.loads(run(*command, "--threads", 1, "--store", tmp_path / "store").stdout)
    assert told["pictures"][0]["engine"] == "openvino"
    assert Path(told["pictures"][0]["file"]).is_file()


def test_a_picture_tells_what_was_merged(bundles: dict[str, Path], tmp_path: Path) -> None:
    """So that a picture of the plain base and one of the base with a style are kept side by side under one name."""
    styled = shutil.copytree(bundles["sd21"], tmp_path / "styled")
    manifest = read_manifest(styled)
    recipe = msgspec.structs.replace(manifest.recipe, merged=(MergedEntry(sha256="ab" * 32, scale=0.5),))
    msgspec.structs.replace(manifest, recipe=recipe, key=recipe.key).write(styled)
    merged = []
    for bundle in (bundles["sd21"], styled, styled):
        command = ("generate", "a dog", "-n", 1, "--steps", 2, "--bundle", bundle, "--out", tmp_path / "out", "--json")
        merged += json.loads(run(*command, "--threads", 1, "--store", tmp_path / "store").stdout)["pictures"]
    assert [picture["merged"] for picture in merged] == ["", *["abababababab:0.5"] * 2]
    assert len({picture["file"] for picture in merged}) == 2
