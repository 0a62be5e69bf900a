"""The tables of methods against the lines that they are made from."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from cpserve import load_base
from trainer import Settings

pytest.importorskip("efficientnet_lite_pytorch")
forgetting = import_module("benchmarks.forgetting")
runs = import_module("benchmarks.forgetting_runs")
README = Path(__file__).parents[1] / "README.md"
PAGE = README.parent / "docs" / "forgetting.md"


def test_the_methods_in_the_readme_are_as_the_committed_lines_say() -> None:
    """Every row to the digit, and all tables on their page: a line that comes in is not seen before its row is."""
    method = Settings().method
    run = forgetting.Run(
        method=method, order=0, seed=0, concepts=10, split="test", settings=forgetting.chosen(method, 0, [])
    )
    made = forgetting.table(load_base(), run)
    page = PAGE.read_text(encoding="utf-8")
    assert all(part in page for part in made.split("\n\n"))
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in made.split("\n\n")[0].splitlines()
    )
    assert len(rows) > len(forgetting.METHODS)
    readme = README.read_text(encoding="utf-8").splitlines()
    assert f"| {' | '.join(head)} |" in readme
    for name, *cells in rows:
        assert f"| {' | '.join([f'`{name.split()[0]}`', *cells])} |" in readme


def test_a_change_to_what_learns_is_decided_on() -> None:
    """Lines made with other code count only for those methods that somebody found to learn the same since: see `SAME_AS`."""
    assert runs.sources() == runs.SAME_AS
