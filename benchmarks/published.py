"""What the reference says of the pictures asked about: a line a concept and seed, in `results/published.jsonl`.

The reference takes a minute a picture, so a later run goes on from these lines, on another machine too. A line depends on the
adapter, the seed of the pictures and the reference's own numbers, and on nothing that `classify` does.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from filelock import FileLock

from benchmarks.error_tables import accuracy
from benchmarks.label_table import average
from benchmarks.label_work import Work
from benchmarks.staged import Progress
from benchmarks.timing import keep, kept_lines

NAME = "published"
HOW = {"engine": "eager", "precision": "float32"}
MEANS = ("accuracy_of_absolute_errors", "evaluations", "curve")


def published(work: Work) -> tuple[dict[str, Any], np.ndarray]:
    """The reference on torch over all seeds, and its labels `[pictures]`; lines are read from `work.results` and kept there."""
    lines = [line for seed in work.asked.seeds for line in _of(work, seed)]
    each = [line for line in lines for _ in line["labels"]]  # a line counts as often as it has pictures
    means = {name: average([line[name] for line in each]) for name in MEANS}
    return asdict(work.asked.published) | HOW | means, np.concatenate([line["labels"] for line in lines])


def _of(work: Work, seed: int) -> list[dict[str, Any]]:
    """One seed's lines, in the order of its pictures; those that are missing are measured first."""
    asked, folder, key = work.asked, work.results, {"seed": seed, "adapter": work.adapters[seed].content_hash[:12]}
    key |= asdict(asked.published) | HOW

    def done() -> dict[int, dict[str, Any]]:
        """By the first picture of each."""
        return {line["start"]: line for line in kept_lines(NAME, folder) if line.items() >= key.items()}

    def missing(start: int) -> bool:
        return not any(first <= start < first + len(line["labels"]) for first, line in done().items())

    every = range(0, asked.concepts * asked.each, asked.each)
    left = [start for start in every if missing(start)]
    progress = Progress(f"reference, seed {seed}, concepts", len(every), len(every) - len(left))
    for start in left:
        measured = _measured(work, seed, start)
        with FileLock(folder / f"{NAME}.lock"):
            if missing(start):  # or another process was as fast
                keep(NAME, key | {"start": start} | measured, folder)
        progress.step()
    return [line for _, line in sorted(done().items())]


def _measured(work: Work, seed: int, start: int) -> dict[str, Any]:
    """One concept's pictures, which several processes may share."""
    asked, plan, adapter, engine = work.asked, work.asked.published, work.adapters[seed], work.engine("eager")
    images, label = work.images(seed)[start : start + asked.each], start // asked.each
    labels = work.labels(engine, adapter, work.closed)
    made, _ = work.staged(
        f"reference-{seed}-{label}", images, 1, lambda some: np.stack([plan.errors(labels, image) for image in some]),
        adapter=adapter.content_hash, plan=asdict(plan), engine=engine.kind,
    )  # fmt: skip
    squares, absolute = np.moveaxis(made, -1, 0)
    truth = np.full(len(images), label)
    return {
        "labels": plan.label(squares).tolist(),
        "accuracy_of_absolute_errors": accuracy(plan.label(absolute), truth),
        "evaluations": round(float((~np.isnan(squares)).sum((1, 2)).mean()), 1),
        "curve": plan.curve(squares, truth),
    }
