"""The parts of the recognition benchmark: the reference, ours, its levers, what more labels cost, an encoder, seconds.

Each says what it found over the seeds asked for, from what lies in the work folder where it does.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.error_tables import (
    Curve,
    Labels,
    Levers,
    Published,
    accuracy,
    calibration_error,
    found_at,
)
from benchmarks.label_work import NEVER_TAUGHT, ROOT, TAUGHT, Asked, Images, Work, pictures, subjects
from benchmarks.lite0 import JUDGE, likeness, lite0_layout
from benchmarks.published import published
from benchmarks.staged import once
from benchmarks.timing import interleaved, machine, medians
from cpserve.adapter import Adapter
from cpserve.engine import Engine
from cpserve.features import encoder_for
from cpserve.measures import unit
from cpserve.recognition import Judging, classify

ALONE = 20
JUDGES = ("recognition", "elimination", "slope", "score", "schedule")  # modules that ours depends on
FALSE_ALARMS = 0.05


@cache
def code() -> str:
    """A hash of the code that ours depends on."""
    return hashlib.sha256(b"".join((ROOT / "cpserve" / f"{name}.py").read_bytes() for name in JUDGES)).hexdigest()[:12]


@cache
def on() -> dict[str, str]:
    """What seconds depend on beside: the processor, and a hash of the code that runs graphs on it."""
    engines, here = [*sorted((ROOT / "cpserve" / "engines").glob("*.py")), ROOT / "export" / "target.py"], machine()
    return {
        "processor": f"{here['cpu']}, {here['isa']}",
        "engines": hashlib.sha256(b"".join(p.read_bytes() for p in engines)).hexdigest()[:12],
    }


def how(engine: Engine) -> dict[str, Any]:
    return {"engine": engine.kind, "precision": engine.precision, "threads": torch.get_num_threads()}


@dataclass(frozen=True, eq=False)
class Judged:
    """What ours said of pictures: `label [P]`, its probability `sure [P]`, `evaluations [P]`, `seconds [P]`. The last label is
    none of these, where it may be said, and `none [P]` its probability.
    """

    label: np.ndarray
    sure: np.ndarray
    evaluations: np.ndarray
    seconds: np.ndarray
    none: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Judged]) -> Judged:
        return cls(*(np.concatenate([vars(one)[name] for one in parts]) for name in vars(parts[0])))


def ours(work: Work, engine: Engine, adapter: Adapter, judging: Judging, what: str, images: Images) -> Judged:
    """All pictures, some dozens at a time; `classify DIR` takes sixteen."""

    def do(some: Images) -> np.ndarray:
        answers = classify(engine, some, adapter, judging)
        at = list(answers[0].probabilities).index
        return np.array([[*a.probabilities.values(), at(a.label), a.evaluations] for a in answers])

    depends = {"adapter": adapter.content_hash, "judging": asdict(judging), "code": code(), **how(engine)}
    made, seconds = work.staged(what, images, 50, do, **depends)
    p, (label, evaluations) = made[:, :-2], made[:, -2:].astype(int).T
    return Judged(label, p.max(1), evaluations, seconds, p[:, -1])


def part_taught(work: Work) -> list[str]:
    """All sequences, the first seed's for more labels, too; the adapters' content hashes."""
    asked, taught = work.asked, [*work.adapters.values()]
    if asked.seeds[0] == Asked.seeds[0]:
        taught.append(work.taught(asked.seeds[0], max(asked.labels), asked.label_steps))
    return [adapter.content_hash[:12] for adapter in taught]


def part_reference(work: Work) -> tuple[dict[str, Any], np.ndarray]:
    """The reference on torch, and its labels."""
    said, label = published(work)
    return said | right(work.asked, label), label


def _each(do: Callable[[Image.Image], np.ndarray], some: Images) -> np.ndarray:
    return np.stack([do(image) for image in some])


def right(asked: Asked, label: np.ndarray) -> dict[str, float]:
    """Accuracy over all pictures and seeds, of near-twins, and of the rest."""
    truth = asked.truth[: len(label)]
    twin = asked.twins[truth]
    parts = {"near_twins": twin, "others": ~twin}
    return {"accuracy": accuracy(label, truth)} | {k: accuracy(label[m], truth[m]) for k, m in parts.items() if m.any()}


def mean(values: np.ndarray, digits: int = 4) -> float:
    return round(float(np.mean(values)), digits)


def typical(seconds: np.ndarray) -> float:
    """The median, which a busy moment of the machine does not move."""
    return round(float(np.median(seconds)), 5)


def cost(one: Judged) -> dict[str, float]:
    return {"evaluations": mean(one.evaluations, 1), "seconds_in_bulk": typical(one.seconds)}


def part_ours(work: Work) -> tuple[dict[str, Any], np.ndarray]:
    """Ours among the known labels, and its labels; the first seed on torch beside."""
    asked, engine, eager = work.asked, work.engine(work.asked.engine), work.engine("eager")
    seen = [ours(work, engine, a, work.closed, f"ours-{seed}", work.images(seed)) for seed, a in work.adapters.items()]
    seed = asked.seeds[0]
    same = ours(work, eager, work.adapters[seed], work.closed, f"ours-eager-{seed}", work.images(seed))
    beside = {**right(asked, same.label), **cost(same), "same_labels": accuracy(same.label, seen[0].label)}
    one = Judged.join(seen)
    return {**how(engine), **right(asked, one.label), **cost(one), "first_seed_on_eager": beside}, one.label


def part_none(work: Work) -> dict[str, Any]:
    """With the defaults: how sure answers are, and what of the pictures never taught is found; thresholds are each seed's own."""
    asked, engine, seen = work.asked, work.engine(work.asked.engine), []
    for seed, adapter in work.adapters.items():
        sets = {
            "fitted": work.images(seed, "fitted"),
            "known": work.images(seed),
            "never": work.images(seed, of=NEVER_TAUGHT[: asked.concepts]),
        }
        seen.append([ours(work, engine, adapter, work.judging, f"{k}-{seed}", v) for k, v in sets.items()])
    _, known, never = (Judged.join(parts) for parts in zip(*seen, strict=True))
    was_right, found = known.label == asked.truth, never.label == asked.concepts
    sure, both = np.concatenate([known.sure, never.sure]), np.concatenate([was_right, found])
    at = np.array([found_at(FALSE_ALARMS, *(judged.none for judged in parts)) for parts in seen])
    return {
        "accuracy": mean(was_right),
        **cost(Judged.join([known, never])),
        "calibration_error": calibration_error(sure, both),
        "sure": sure.round(4).tolist(),
        "right": both.astype(int).tolist(),
        "pictures_never_taught": len(found),
        "by_default": {"false_alarms": mean(known.label == asked.concepts), "found": mean(found)},
        "at_threshold": _found(*at.mean(0)),
    }


def _found(false_alarms: float, found: float) -> dict[str, float]:
    return {"false_alarms": round(false_alarms, 4), "found": round(found, 4)}


def part_levers(work: Work) -> dict[str, Curve]:
    """Each lever on top of the one before, the last being ours; all on one table."""
    asked, engine, seed_of_draws, tables = work.asked, work.engine(work.asked.engine), work.judging.seed, []
    for seed, adapter in work.adapters.items():
        do = partial(
            _each, partial(Levers.measure, work.labels(engine, adapter, work.judging), seed_of_draws, asked.pairs)
        )
        depends = {"adapter": adapter.content_hash, "pairs": asked.pairs, "seed": seed_of_draws}
        depends |= {"engine": engine.kind, "precision": engine.precision}
        tables.append(work.staged(f"levers-{seed}", work.images(seed), 4, do, **depends)[0])
    t = Levers.timesteps(seed_of_draws, asked.pairs, work.base.spec.schedule.steps)
    return Levers(np.concatenate(tables), t, asked.truth, work.base.spec.elements).rows(work.closed)


def part_scaling(work: Work) -> list[dict[str, float]]:
    """Accuracy and cost at other numbers of labels, of one sequence learned in fewer steps."""
    asked, engine, seed, rows = (
        work.asked,
        work.engine(work.asked.engine),
        work.asked.seeds[0],
        list[dict[str, float]](),
    )
    for count in asked.labels:
        adapter = work.taught(seed, count, asked.label_steps)
        each = max(1, min(asked.each, asked.label_pictures // count))
        images = [p for subject in subjects()[:count] for p in pictures(subject, seed, "asked", each)]
        for kept in (work.closed.kept, 0)[: 1 + (count > work.closed.kept)]:
            seen = ours(work, engine, adapter, replace(work.closed, kept=kept), f"scaling-{count}", images)
            right_of_all = accuracy(seen.label, np.arange(count).repeat(each))
            row = {"labels": count, "kept": kept, "steps": asked.label_steps, "pictures": len(images)}
            row |= {"accuracy": right_of_all, **cost(seen)}
            rows.append({**row, "reference_evaluations": asked.published.evaluations(count)})
    return rows


def part_encoder(work: Work) -> dict[str, Any]:
    """A plain encoder: the nearest mean of the taught pictures' features, by the cosine, the common mean removed."""
    pooled = encoder_for("builtin:")[1]
    kinds = {"lite0": lambda some: unit(pooled(some)), "lite0_layout": lambda some: lite0_layout(some, *JUDGE)}
    return {name: _encoder(work, name, encode) for name, encode in kinds.items()}


def _encoder(work: Work, name: str, encode: Callable[[Images], np.ndarray]) -> dict[str, Any]:
    asked, labels, at, seconds = work.asked, [], [], []
    for seed in asked.seeds:
        taught = [p for subject in asked.known for p in pictures(subject, seed, "taught", TAUGHT)]
        sets = [
            taught,
            work.images(seed, "fitted"),
            work.images(seed),
            work.images(seed, of=NEVER_TAUGHT[: asked.concepts]),
        ]
        parts = [work.staged(f"{name}-{seed}", images, 100, encode, threads=torch.get_num_threads()) for images in sets]
        means = parts[0][0].reshape(asked.concepts, TAUGHT, -1).mean(1)
        like = [likeness(features, means) for features, _ in parts[1:]]
        labels.append(like[1].argmax(1))
        seconds.append(parts[2][1])
        at.append(found_at(FALSE_ALARMS, *(-c.max(1) for c in like)))
    found = {"at_threshold": _found(*np.mean(at, 0))}
    return {**right(asked, np.concatenate(labels)), "seconds_in_bulk": typical(np.concatenate(seconds)), **found}


def part_timing(work: Work) -> dict[str, float]:
    """Seconds of one picture alone: medians of rivals taking turns, ours at `ALONE` pictures a turn, whose cost differs."""
    asked, seed, rivals = work.asked, work.asked.seeds[0], dict[str, Callable[[], object]]()
    adapter, images, closed = work.adapters[seed], work.images(seed), work.closed
    mixed = [images[i] for i in np.random.default_rng(0).permutation(len(images))]
    engines = [work.engine(kind) for kind in dict.fromkeys(("eager", asked.engine))]
    for engine in engines:
        labels, turns = work.labels(engine, adapter, closed), [itertools.cycle(mixed) for _ in "ab"]
        rivals[f"reference {engine.kind}"] = partial(_published, labels, asked.published, turns[0])
        rivals[f"ours {engine.kind}"] = partial(_classify, engine, adapter, closed, turns[1])
    depends = {"judging": asdict(closed), "code": code(), "plan": asdict(asked.published), "rounds": asked.rounds}
    depends |= {"alone": ALONE, "on": on()}
    folder = work.folder("timing", adapter=adapter.content_hash, engines=[how(e) for e in engines], **depends)
    took = once(folder / "seconds.json", lambda: medians(interleaved(rivals, asked.rounds)))
    return {name: seconds / (ALONE if name.startswith("ours") else 1) for name, seconds in took.items()}


def _published(labels: Labels, plan: Published, turn: Iterator[Image.Image]) -> None:
    plan.errors(labels, next(turn))


def _classify(engine: Engine, adapter: Adapter, judging: Judging, turn: Iterator[Image.Image]) -> None:
    for _ in range(ALONE):
        classify(engine, [next(turn)], adapter, judging)
