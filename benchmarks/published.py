"""What the reference says of the pictures asked about: a line a concept and seed, in `results/published.jsonl`.

The reference takes a minute a picture, so a later run goes on from these lines, on another machine too if that teaches the same
adapter to the bit. A line depends on the adapter, the pictures and the reference's own numbers, and on nothing that
`classify` does. Its key does not know the pictures: who changes how they are made (`label_work.pictures`) takes all lines out.
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
    means = {name: average([line[name] for line in lines]) for name in MEANS}
    return asdict(work.asked.published) | HOW | means, np.concatenate([line["labels"] for line in lines])


def _of(work: Work, seed: int) -> list[dict[str, Any]]:
    """One seed's lines, in the order of its pictures; those that are missing are measured first."""
    asked, folder, adapter = work.asked, work.results, work.adapters[seed]
    key = {"seed": seed, "each": asked.each, "adapter": adapter.content_hash[:12], **asdict(asked.published), **HOW}

    def done() -> dict[int, dict[str, Any]]:
        """By the concept that is there."""
        return {line["concept"]: line for line in kept_lines(NAME, folder) if line.items() >= key.items()}

    left = sorted({*range(asked.concepts)} - {*done()})
    progress = Progress(f"reference, seed {seed}, concepts", asked.concepts, asked.concepts - len(left))
    for concept in left:
        measured = _measured(work, seed, concept)
        with FileLock(work.root / f"{NAME}.lock"):
            if concept not in done():  # or another process was as fast
                keep(NAME, key | {"concept": concept} | measured, folder)
        progress.step()
    return [line for _, line in sorted(done().items())]


def _measured(work: Work, seed: int, concept: int) -> dict[str, Any]:
    """One concept's pictures, which several processes may share."""
    asked, plan, adapter, engine = work.asked, work.asked.published, work.adapters[seed], work.engine("eager")
    images = work.images(seed)[concept * asked.each :][: asked.each]
    labels = work.labels(engine, adapter, work.closed)
    made, _ = work.staged(
        f"reference-{seed}-{concept}", images, 1, lambda some: np.stack([plan.errors(labels, image) for image in some]),
        adapter=adapter.content_hash, plan=asdict(plan), engine=engine.kind,
    )  # fmt: skip
    squares, absolute = np.moveaxis(made, -1, 0)
    truth = np.full(len(images), concept)
    return {
        "labels": plan.label(squares).tolist(),
        "accuracy_of_absolute_errors": accuracy(plan.label(absolute), truth),
        "evaluations": round(float((~np.isnan(squares)).sum((1, 2)).mean()), 1),
        "curve": plan.curve(squares, truth),
    }
