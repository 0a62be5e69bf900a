"""The recognition benchmark's curves as a picture: who is right at how many evaluations, and what more labels cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

UNSHOWN = "each label its own draws"  # near chance, far below what the axis shows
PUBLISHED, OURS = "ks-", "r*-"  # how they are drawn


def plot(line: dict[str, Any], path: Path) -> None:
    """Two panels, of as much as `line` (see `label_table.together`) says."""
    parts = [(_accuracy, line), *([(_scaling, line["scaling"])] if "scaling" in line else [])]
    figure = Figure(figsize=(5.5 * len(parts), 4), layout="constrained")
    for axes, (draw, what) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        draw(axes, what)
        _plain(axes)
    figure.savefig(path, dpi=110)


def _accuracy(axes: Axes, line: dict[str, Any]) -> None:
    levers = {name: curve for name, curve in line.get("levers", {}).items() if name != UNSHOWN}
    for i, (name, curve) in enumerate(levers.items(), 1):
        axes.plot(*_percent(curve), ".-", color=colormaps["viridis_r"](i / len(levers)), label=name)
    axes.plot(*_percent(line["reference"]["curve"]), PUBLISHED, ms=4, label="as published")
    axes.plot(*_percent([(line["ours"]["evaluations"], line["ours"]["accuracy"])]), OURS, ms=12, label="classify")
    axes.set(
        xscale="log", xlabel="evaluations of the model a picture", ylabel=f"right among {line['concepts']:g} labels, %"
    )
    axes.legend(fontsize=8, loc="lower right")


def _percent(curve: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [spent for spent, _ in curve], [100 * share for _, share in curve]


def _scaling(axes: Axes, rows: list[dict[str, float]]) -> None:
    few = [row for row in rows if row["kept"]]
    all_judged = [row for row in rows if not row["kept"] or row["labels"] <= row["kept"]]
    for name, some, key, style in (
        ("as published", few, "reference_evaluations", PUBLISHED),
        ("every label judged", all_judged, "evaluations", "C0.-"),
        ("classify", few, "evaluations", OURS),
    ):
        axes.plot([row["labels"] for row in some], [row[key] for row in some], style, ms=6, label=name)
    axes.set(xscale="log", yscale="log", xlabel="labels", ylabel="evaluations of the model a picture")
    axes.set_xticks([row["labels"] for row in few])
    axes.legend(fontsize=8)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
