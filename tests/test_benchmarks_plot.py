"""The curves of what recognising costs against the lines that they are drawn from."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("efficientnet_lite_pytorch")
labels = import_module("benchmarks.labels")
COMMITTED = Path(__file__).parents[1] / "docs" / "recognising.png"


def test_the_curves_in_the_readme_are_those_of_the_committed_lines(tmp_path: Path) -> None:
    """To the pixel: a line that comes in is not seen before `labels.py --plot docs/recognising.png` has run again."""
    labels.plot(labels.found(labels.RESULTS), tmp_path / "new.png")
    new, committed = (np.asarray(Image.open(path)) for path in (tmp_path / "new.png", COMMITTED))
    assert np.array_equal(new, committed)
