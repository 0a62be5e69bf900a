"""What the lines of `forgetting.py` come to: means with standard errors, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.forgetting_runs import (
    BESIDE,
    CHOSEN,
    ORDERLESS,
    SAME,
    SAME_AS,
    Run,
    in_every_order,
    of_the_same_last,
    sources,
    whole,
)
from benchmarks.markdown import markdown
from benchmarks.timing import kept_lines
from cpserve.base import BaseModel
from trainer import Settings

Lines = Sequence[dict[str, Any]]
LEFT = {
    "alignment_learned": "alignment when learned", "alignment": "at the end", "last_alignment": "of the last one",
    "recognised_learned": "recognised when learned", "recognised": "at the end", "kept": "kept", "drift": "drift",
}  # fmt: skip
REST = {
    "dc_learned": "DC accuracy when learned", "dc": "at the end", "a_mmd": "A_MMD", "f_mmd": "F_MMD",
    "update_first": "first update", "update_last": "last update", "training_bytes": "bytes kept for training",
    "adapter_bytes": "bytes of LoRA",
}  # fmt: skip
"""Measures and what the tables call them: what is left of the concepts at the end, and the rest. Seconds and memory depend on
the machine and on what else it did: `training.py` has them, of all methods in turns."""
COMPARED = ("alignment", "last_alignment", "recognised", "dc", "kept", "a_mmd", "f_mmd", "drift")
DEFAULT = Settings().method


def measured(line: dict[str, Any], column: str) -> float | None:
    """A column's value in one run; `update_*` are the sum of `|B A|` that the first and the last concept added.

    `kept` leaves out the last concept, which nothing came after.
    """
    if column == "kept" and "kept_matrix" in line:
        return float(np.mean(line["kept_matrix"][-1][:-1]))
    if column.startswith("update_"):
        return line["update_l1"][0 if column == "update_first" else -1] if "update_l1" in line else None
    return line.get(column)


def cell(values: Sequence[float]) -> str:
    """A mean and its standard error."""
    if not values:
        return "–"
    digits = 3 if max(map(abs, values)) < 10 else 0
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def tables(lines: Lines, shown: Sequence[Mapping[str, str]] = (LEFT, REST)) -> str:
    """Each method at each of its settings (and each state of the code): means over orders and seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    several = len({line["sources"] for line in lines}) > 1
    for line in lines:
        own = [f"{k}={v}" for k, v in sorted(line["settings"].items()) if k not in {"seed", "method", "steps"}]
        variant = [f"with {line['variant']}"] if "variant" in line else []  # code of a trial that did not stay
        name = " ".join([line["method"], *variant, *own, *([f"({line['sources']})"] if several else [])])
        groups.setdefault(name, []).append(line)
    return "\n\n".join(_table(groups, columns) for columns in shown)


def _table(groups: Mapping[str, Lines], columns: Mapping[str, str]) -> str:
    body = []
    for name, group in groups.items():
        values = [[m for line in group if (m := measured(line, column)) is not None] for column in columns]
        body.append([name, str(len(group)), *map(cell, values)])
    return markdown(["method", "runs", *columns.values()], body)


def differences(lines: Lines, reference: str) -> str:
    """Every other method's runs less the reference's of the same order and seed; what knows no order stands in each, and such a
    run counts once, with the mean of its differences.
    """
    ours = {(line["order"], line["seed"]): line for line in lines if line["method"] == reference}
    body = []
    for method in dict.fromkeys(line["method"] for line in lines if line["method"] != reference):
        pairs = [(o, x) for x in lines if x["method"] == method and (o := ours.get((x["order"], x["seed"])))]
        less = [_by_run(pairs, column) for column in COMPARED]
        body.append([f"{method} less {reference}", str(max(map(len, less))), *map(cell, less)])
    return markdown(["", "pairs", *COMPARED], body)


def _by_run(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], column: str) -> list[float]:
    """How far each second one of the pairs is above the first, where both were measured; the mean of those of one run."""
    groups: dict[object, list[float]] = {}
    for ours, theirs in pairs:
        low, high = measured(ours, column), measured(theirs, column)
        if low is not None and high is not None:
            orderless = not {ours["method"], theirs["method"]}.isdisjoint(ORDERLESS)
            run = theirs["seed"] if orderless else (theirs["order"], theirs["seed"])
            groups.setdefault(run, []).append(high - low)
    return [float(np.mean(each)) for each in groups.values()]


def committed() -> list[dict[str, Any]]:
    """The result lines so far; what was made with other sources that come to the same is as good as new."""
    lines, now = kept_lines("forgetting"), sources()
    return [x | {"sources": now} if now == SAME_AS and x["method"] in SAME.get(x["sources"], ()) else x for x in lines]


def table(base: BaseModel, one: Run, given: Sequence[str] = ()) -> str:
    """Of those runs that are in, the README's table, what else was measured, and paired differences; then the same of what
    stands beside.
    """
    lines, names = committed(), replace(one, order=0).names

    def kept(settings: Mapping[str, str]) -> list[dict[str, Any]]:
        keys = [each.key(base) for each in whole(one, given, settings)]
        return [line for key in keys for line in lines if line.items() >= key.items()]

    now, beside = kept(CHOSEN), kept(BESIDE)
    beside = [x | {"method": f"{DEFAULT} as swept"} if x["method"] == DEFAULT else x for x in beside]
    seen = [each for line in now for each in in_every_order(line, names)]
    compared = [*(line for line in now if line["method"] == DEFAULT), *beside]
    return "\n\n".join(
        [
            tables(of_the_same_last(now, names)),
            differences(seen, DEFAULT),
            differences(seen, "token"),
            tables(of_the_same_last(beside, names), [LEFT]),
            differences(compared, DEFAULT),
        ]
    )
