"""Laws of evaluating a lineage of versions."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from adapter_store import Store
from cpserve.base import BaseModel
from cpserve.cli import main
from cpserve.engines.eager import EagerEngine
from cpserve.evaluation import EVALUATED, UNRELATED, Evaluation, evaluate
from tests.lessons import QUICK, concept, learned, lineage
from trainer.settings import NOUNS, PROTECTED, TEMPLATES, UNSEEN, UNSEEN_NOUNS

EXAMPLES = Path(__file__).parents[1] / "examples"


def colours(pictures: Sequence[Image.Image]) -> np.ndarray:
    """An encoder that needs no weights."""
    return np.stack([np.asarray(p.convert("RGB").resize((4, 4)), float).ravel() + 1 for p in pictures])


@pytest.fixture(scope="module")
def made(bases: dict[str, BaseModel], tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    base, folder = bases["sd21"], tmp_path_factory.mktemp("lineage")
    settings = replace(QUICK, method="none", factor_rate=0.05)
    versions = lineage(base, folder, settings, "dog", "cat")
    with EagerEngine(base) as engine:
        return evaluate(
            engine, versions, colours, {"cat": [p.image for p in concept("cat", 1).pictures]}, each=1, steps=3
        )


def test_every_version_is_measured_on_every_concept_it_knows(made: Evaluation) -> None:
    """The matrices are lower triangles; a concept just learned is wholly kept, one before it is not under `none`."""
    assert {j: sorted(row) for j, row in made.kept.items()} == {0: [0], 1: [0, 1]}
    assert made.kept[0][0] == pytest.approx(1)
    assert made.kept[1][1] == pytest.approx(1)
    assert made.kept[1][0] < 0.9999
    assert len(made.drift) == 2
    assert all(d > 0 for d in made.drift)


def test_what_changes_nothing_does_not_drift(bases: dict[str, BaseModel], tmp_path: Path) -> None:
    """A version without a LoRA draws unrelated prompts exactly as the base does."""
    dog = replace(learned(bases["sd21"], tmp_path, QUICK, "dog"), lora={})
    with EagerEngine(bases["sd21"]) as engine:
        assert evaluate(engine, [dog], colours, {}, each=1, steps=2).drift == [pytest.approx(0, abs=1e-6)]


def test_only_what_has_real_pictures_is_compared_with_them(made: Evaluation) -> None:
    """Alignment and A_MMD stand for the concept that has pictures, and the summary says what is missing."""
    assert made.alignment == {0: {}, 1: {1: pytest.approx(made.alignment[1][1])}}
    assert set(made.a_mmd) == {1}
    assert made.summary()["forgetting"] is None
    assert made.summary()["kept"] == pytest.approx(made.kept[1][0], abs=1e-4)


def test_what_is_forgotten_is_no_longer_recognised_in_its_own_drawings(
    bases: dict[str, BaseModel], tmp_path: Path
) -> None:
    """Without any real picture: a version whose tokens are swapped takes what was right for wrong, and wrong for right."""
    base, settings = bases["sd21"], replace(QUICK, method="none", factor_rate=0.05, token_rate=0.5)
    one, two = lineage(base, tmp_path, settings, "dog", "cat")
    dog, cat = two.embeddings["<dog>"], two.embeddings["<cat>"]
    swapped = replace(two, embeddings={"<dog>": cat, "<cat>": dog})
    with EagerEngine(base) as engine:
        right, wrong = (evaluate(engine, [one, v], colours, {}, each=2, steps=3).dc for v in (two, swapped))
    assert right[0] == wrong[0] == {0: 1}
    assert right[1] == {i: 1 - wrong[1][i] for i in (0, 1)}


def test_evaluation_prompts_occur_nowhere_in_training() -> None:
    """None of them is a template or a protected wording, nor are unrelated prompts about a protected thing."""
    assert not {*EVALUATED, *UNSEEN} & {*TEMPLATES, *PROTECTED}
    assert not {*NOUNS} & {word for text in (*UNRELATED, *UNSEEN_NOUNS) for word in text.split()}


@pytest.fixture(scope="module", name="store")
def _store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """In which `default` was taught a cat and a rocket on the built-in base, in next to no time."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "run.toml").write_text("steps = 2\nbatch = 2\nvariants = 1\n")
    teach = ["train", "--concept", str(EXAMPLES / "cat.zip"), "--concept", str(EXAMPLES / "rocket.zip")]
    taught = CliRunner().invoke(main, [*teach, "--store", str(folder), "--config", str(folder / "run.toml")])
    assert taught.exit_code == 0, taught.output
    return str(folder)


def test_the_readme_draws_from_python(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its block of Python, as it stands there."""
    monkeypatch.setenv("CPSERVE_HOME", store)
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(block, {})
    with Image.open(tmp_path / "rocket.png") as picture:
        assert picture.size == (64, 64)


def test_the_command_writes_numbers_and_a_picture(store: str, tmp_path: Path) -> None:
    """`cpserve eval` on the built-in base after two concepts: JSON on stdout alone, and both files; the matrix is drawn."""
    out = tmp_path / "out"
    asked = ["eval", "default", "--store", store, "--pictures", str(EXAMPLES / "unseen"), "--out", str(out)]
    result = CliRunner().invoke(main, [*asked, "--each", "1", "--steps", "2", "--json"])
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["concepts"] == ["cat", "rocket"]
    assert 0 <= value["dc"] <= 1
    assert json.loads((out / "evaluation.json").read_text()) == value
    version = Store(store).version("default")
    assert (value["version"], value["manifest_sha256"]) == (str(version), version.pin.manifest_sha256)
    with Image.open(out / "versions.png") as sheet:
        width, height = sheet.size
        rows = np.split(np.asarray(sheet.convert("L"))[height - 164 :], 2)  # pictures of 64 pixels, a line below each
        assert all((row[:, : width - 130] < 128).any() for row in rows)  # a name beside them
        below = [[(row[65:81, x : x + 64] < 128).any() for x in (width - 130, width - 64)] for row in rows]
        assert below == [[True, True], [False, True]]  # nothing below the second concept before it was learned
    assert value["a_mmd_by_concept"].keys() == {"cat", "rocket"}
    assert value["f_mmd_by_concept"].keys() == {"cat"}
    again = CliRunner().invoke(main, asked)
    assert again.exit_code == 1
    assert "holds an evaluation already" in again.stderr
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "cat").symlink_to(EXAMPLES / "unseen" / "cat")
    some = ["eval", "default", "--store", store, "--pictures", str(tmp_path / "some"), "--out", str(tmp_path / "part")]
    half = CliRunner().invoke(main, [*some, "--each", "1", "--steps", "2"])
    assert "with `kept` below each" in half.stdout, half.output  # the nearness of one concept would leave a row without
    nowhere = CliRunner().invoke(
        main, ["eval", "default", "--store", store, "--pictures", str(tmp_path), "--out", str(tmp_path / "none")]
    )
    assert nowhere.exit_code == 1
    assert "pictures of none of cat, rocket" in nowhere.stderr
