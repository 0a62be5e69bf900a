"""Laws of `cpserve demo`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from adapter_store import Store
from cpserve.base import BaseModel
from cpserve.cli import main
from trainer import Record
from trainer.loop import Stage, optimise


def stopping_at_the_cat(stage: Stage, record: Record, progress: object) -> None:
    if record.read_run().concept.name == "cat":
        raise KeyboardInterrupt
    optimise(stage, record, progress)


def test_a_stopped_demo_goes_on_where_it_was(
    bases: dict[str, BaseModel], bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its second concept, it keeps the first one's version, and the same command ends with a page about both."""
    monkeypatch.setattr("cpserve.demo.load_base", lambda: bases["sd21"])
    shutil.copytree(bundles["sd21"], tmp_path / "demo" / "bundle")
    examples = tmp_path / "examples"
    for name, colours in {"rocket": ("red", "orange"), "cat": ("blue", "cyan")}.items():
        for folder in (examples / name, examples / "unseen" / name):
            folder.mkdir(parents=True)
            for colour in colours:
                Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.jpg")
        shutil.make_archive(str(examples / name), "zip", examples / name)
    command = ["demo", "--examples", str(examples), "--out", str(tmp_path / "demo"), "--steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr("trainer.sequence.optimise", stopping_at_the_cat)
        stopped = CliRunner().invoke(main, command)
    assert stopped.exit_code == 130
    assert "stopped: what was learned so far is kept; the same command goes on with it" in stopped.stderr
    store = Store(tmp_path / "demo" / "store")
    [name] = store.names()
    first = store.version(name).pin
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert f"learned before, in {store.root}: rocket" in done.stderr
    told = json.loads(done.stdout)
    assert (told["concepts"], told["dc_pictures"]) == (2, 4)
    assert told["largest_pixel_difference"] < 3
    assert store.version(name).manifest.trained_from == first
    assert "&lt;cat&gt;" in Path(told["report"]).read_text()
