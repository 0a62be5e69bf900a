"""Laws of the arithmetic that the recognition benchmark's figures come from, on errors made by hand."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.error_tables import Labels, Levers, Published, calibration_error, found_at, interval
from benchmarks.label_table import average, difference
from benchmarks.timing import kept_lines
from cpserve.recognition import Judging

PLAN = Published(first=4, total=12, keep=2)


def test_the_reference_looks_where_its_algorithm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every label under `first` draws spread over the schedule, the best `keep` under all; the smallest mean squared error wins."""
    truth = np.array([3.0, 1.0, 2.0, 9.0])  # mean errors by label

    def errors(self: Labels, _: torch.Tensor, draw: Any) -> np.ndarray:
        noise = np.random.default_rng(0).normal(0, 0.1, (len(draw.t), len(self.slots), 1))
        return np.repeat(truth[self.slots.numpy()][None, :, None] + noise, 2, 2)

    monkeypatch.setattr(Labels, "errors", errors)
    monkeypatch.setattr("benchmarks.error_tables.latents_of", lambda *_: torch.zeros(1, 4, 8, 8))
    engine = cast("Any", SimpleNamespace(spec=SimpleNamespace(schedule=SimpleNamespace(steps=1200))))
    made = PLAN.errors(Labels(engine, torch.empty(0), torch.arange(4)), Image.new("RGB", (8, 8)))
    asked = ~np.isnan(made[..., 0])
    assert asked.sum() == PLAN.evaluations(4)
    assert asked.sum(0).tolist() == [4, 12, 12, 4]
    assert np.flatnonzero(asked[:, 0]).tolist() == [1, 4, 7, 10]
    assert PLAN.label(made[None, ..., 0]).tolist() == [1]
    spent, right = zip(*PLAN.curve(made[None, ..., 0], np.array([1])), strict=True)
    assert spent[-1] == PLAN.evaluations(4)
    assert right[-1] == 1


def test_each_lever_has_its_row() -> None:
    """Where the true label explains a corner of the picture, every row that pairs draws is right; what races never costs more than
    all labels and c_0 at all draws, and less where few go on.
    """
    rng, truth = np.random.default_rng(0), np.arange(4).repeat(3)
    maps = 100 + rng.normal(0, 1, (len(truth), 16, 2, 1, 8, 8)) + rng.normal(0, 0.1, (len(truth), 16, 2, 5, 8, 8))
    maps[np.arange(len(truth)), :, :, truth, :4, :4] -= 20
    rows = Levers(maps, np.linspace(0.2, 0.59, 16), truth, 256).rows(Judging(none=False, kept=2))
    for name, curve in rows.items():
        spent, right = zip(*curve, strict=True)
        assert list(spent) == sorted(spent)
        assert name == "each label its own draws" or set(right) == {1}
        assert all(e <= n * 5 for e, n in zip(spent, (2, 4, 8, 16, 32), strict=False))
    assert list(rows)[-3:] == ["by region", "the middle first", "at most 2 go on"]
    assert rows["at most 2 go on"][-1][0] <= rows["the middle first"][-1][0]


def test_the_calibration_error_is_the_distance_from_the_share_right() -> None:
    """Within bins, and weighted by their pictures: three at 0.9 of which two are right, one wrong at 0.5."""
    found = calibration_error(np.array([0.9, 0.9, 0.9, 0.5]), np.array([True, True, False, False]))
    assert found == pytest.approx((3 * abs(0.9 - 2 / 3) + 0.5) / 4, abs=1e-4)
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 100_000)
    assert calibration_error(p, rng.uniform(size=len(p)) < p) < 0.01  # about 0.003 is chance


def test_the_interval_is_that_of_the_mean() -> None:
    """As wide as the normal one of as many values, within a tenth."""
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = interval(values)
    wide = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - wide, values.mean() + wide), abs=wide / 5)


def test_a_threshold_is_fitted_on_other_pictures() -> None:
    """At a twentieth, it is the score that one in twenty of the fitted ones exceed, whatever the others are."""
    fitted = np.arange(100) / 100
    assert found_at(0.05, fitted, np.array([0.94, 0.96]), np.array([0.1, 0.97, 0.98, 0.99])) == (0.5, 0.75)


def test_a_difference_is_of_the_same_pictures() -> None:
    """Its mean is that of accuracies; by concepts, a concept that is all wrong counts as one, so the interval is wider."""
    truth = np.arange(20).repeat(10)
    mine, theirs = truth.copy(), truth.copy()
    theirs[truth < 2] = 19
    found = difference(truth, mine, theirs)
    assert found["mean"] == 0.1
    (low, high), (least, most) = found["interval"], found["interval_by_concept"]
    assert least <= low < 0.1 < high <= most


def test_an_average_is_of_numbers_at_any_depth() -> None:
    assert average([{"a": [1, {"b": 2.0}], "c": "x"}, {"a": [3, {"b": 4.0}], "c": "x"}]) == {
        "a": [2, {"b": 3}],
        "c": "x",
    }


def test_seconds_are_of_one_processor(tmp_path: Path) -> None:
    """The last line's: those of another one stand, and are in no mean with it."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("efficientnet_lite_pytorch")
    labels = import_module("benchmarks.labels")
    for name in labels.LINES:
        shutil.copy(labels.RESULTS / f"{name}.jsonl", tmp_path)
    last = [line for line in kept_lines("seconds") if line["precision"] == "float32"][-1]
    for seed, seconds in ((0, 1.0), (1, 3.0)):
        alone = dict.fromkeys(last["seconds_alone"], seconds)
        line = last | {"seeds": [seed], "processor": "another", "seconds_alone": alone}
        with (tmp_path / "seconds.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert labels.found(tmp_path)["seconds_alone"] == dict.fromkeys(last["seconds_alone"], 2.0)
