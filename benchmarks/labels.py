"""Which learned concept is this? The diffusion classifier as published (`error_tables.Published`) against `classify`.

Physics: the noise in a picture is predicted best under the prompt that explains the picture. One look (t, noise) at one label
is one UNet evaluation, and the difference between two labels' errors is far smaller than either error: how many looks it takes
to see it above the noise is the whole cost. The reference spends a fixed number (at 20 labels 50 x 20 + 450 x 5 = 3250);
`classify` looks where labels differ most, with opposite noise, and drops labels as soon as a paired test rules them out.

Data: 20 held-out concepts, six things drawn in two styles among them (near-twins), taught in sequence with the default method
from six pictures each; asked about ten pictures each of the same drawings with turns and clutter that were not taught, and
ten each of 20 held-out concepts never taught. Three seeds, each with its own pictures, training and draws. The reference
knows no "none of these": accuracy and cost compare both among the known labels (`none=False`), with the reference on torch
as the authors ran it, and seconds on the same engine beside. Calibration and "none of these" are measured with the defaults;
the threshold at 5 % false alarms is fitted on further pictures of the known concepts. Seconds of a picture alone are medians
of rivals taking turns. The levers are judged from one table of errors. Beside ours: Lite0's nearest class mean.

Everything learned and measured is kept in `--work` by what it depends on (base, settings, seed, labels, code that judges): a
killed run goes on where it was. The last part is one line in `results/labels.jsonl`.

    python tools/emoji64/sources.py && python tools/emoji64/render.py     # the drawings, once
    python benchmarks/labels.py [--engine openvino] # hours; most of them the reference's
    python benchmarks/labels.py --quick             # a few small concepts through every part; no line is kept
    python benchmarks/labels.py --only taught       # or: reference, levers, ...; parts of the work, to spread over time
    python benchmarks/labels.py --table             # the README's tables from the last committed line
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "emoji64"))

import cpserve
from benchmarks.error_tables import (
    Curve,
    Labels,
    Levers,
    Published,
    accuracy,
    calibration_error,
    found_at,
    interval,
    once,
)
from benchmarks.label_work import NEVER_TAUGHT, QUICK, ROOT, TAUGHT, Asked, Images, Work, pictures, subjects
from benchmarks.lite0 import JUDGE, likeness, lite0_layout
from benchmarks.timing import RESULTS, interleaved, keep, medians
from cpserve.adapter import Adapter
from cpserve.engine import Engine
from cpserve.features import encoder_for
from cpserve.measures import unit
from cpserve.recognition import Judging, answer_of, classify, labels_of, measure

JUDGES = ("recognition", "elimination", "score", "schedule")  # modules that ours depends on
FALSE_ALARMS = 0.05


@cache
def code() -> str:
    """A hash of the code that ours depends on."""
    return hashlib.sha256(b"".join((ROOT / "cpserve" / f"{name}.py").read_bytes() for name in JUDGES)).hexdigest()[:12]


def how(engine: Engine) -> dict[str, Any]:
    return {"engine": engine.kind, "precision": engine.precision, "threads": torch.get_num_threads()}


@dataclass(frozen=True, eq=False)
class Judged:
    """What ours said of pictures: `label [P]`, its probability `sure [P]`, `evaluations [P]`, `seconds [P]`. The last label is
    none of these, where it may be said; `none [P,2]` are two scores of it: its probability, and the ratio of the
    best known label's error to its own.
    """

    label: np.ndarray
    sure: np.ndarray
    evaluations: np.ndarray
    seconds: np.ndarray
    none: np.ndarray

    SCORES = ("probability", "error")

    @classmethod
    def join(cls, parts: Sequence[Judged]) -> Judged:
        return cls(*(np.concatenate([vars(one)[name] for one in parts]) for name in vars(parts[0])))


def ours(work: Work, engine: Engine, adapter: Adapter, judging: Judging, what: str, images: Images) -> Judged:
    """All pictures, some dozens at a time as `classify DIR` does."""

    def do(some: Images) -> np.ndarray:
        return np.moveaxis(measure(engine, some, adapter, judging), 0, 1)  # [pictures,looks,labels]

    depends = {"adapter": adapter.content_hash, "judging": asdict(judging), "code": code(), **how(engine)}
    errors, seconds = work.staged(what, images, 50, do, **depends)
    labels = list(labels_of(adapter, judging))
    answers = [answer_of(one, labels, engine.spec.elements) for one in errors]
    p = np.array([list(a.probabilities.values()) for a in answers])
    none = np.stack([p[:, -1], np.array([_behind(one) for one in errors])], 1)
    chosen = np.array([labels.index(a.label) for a in answers])
    return Judged(chosen, p.max(1), np.array([a.evaluations for a in answers]), seconds, none)


def _behind(errors: np.ndarray) -> float:
    """Of errors `[looks,labels]`, the least ratio of a label's mean to the last label's, over the looks that both were in."""
    both = ~np.isnan(errors[:, :-1]) & ~np.isnan(errors[:, -1:])
    sums = [np.where(both, e, 0).sum(0) for e in (errors[:, :-1], errors[:, -1:])]
    return float((sums[0] / sums[1]).min())


def part_taught(work: Work) -> list[str]:
    """All sequences; the adapters' content hashes."""
    longest = work.taught(work.asked.seeds[0], max(work.asked.labels), work.asked.label_steps)
    return [adapter.content_hash[:12] for adapter in (*work.adapters.values(), longest)]


def part_reference(work: Work) -> tuple[dict[str, Any], np.ndarray]:
    """The reference on torch, and its labels."""
    asked, plan, engine = work.asked, work.asked.published, work.engine("eager")
    tables, seconds = [], []
    for seed, adapter in work.adapters.items():
        do = partial(_each, partial(plan.errors, work.labels(engine, adapter)))
        depends = {"adapter": adapter.content_hash, "plan": asdict(plan), "engine": engine.kind}
        table, took = work.staged(f"reference-{seed}", work.images(seed), 1, do, **depends)
        tables.append(table)
        seconds.append(took)
    squares, absolute = np.moveaxis(np.concatenate(tables), -1, 0)
    label, truth = plan.label(squares), asked.truth
    return {
        **asdict(plan),
        **how(engine),
        **right(asked, label),
        "accuracy_of_absolute_errors": accuracy(plan.label(absolute), truth),
        "evaluations": mean((~np.isnan(squares)).sum((1, 2)), 1),
        "seconds_in_bulk": typical(np.concatenate(seconds)),
        "curve": plan.curve(squares, truth),
    }, label


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
    at = np.array([[found_at(FALSE_ALARMS, *(j.none[:, i] for j in parts)) for i in range(2)] for parts in seen]).mean(
        0
    )
    return {
        "accuracy": mean(was_right),
        **cost(Judged.join([known, never])),
        "calibration_error": calibration_error(sure, both),
        "calibration_error_of_known": calibration_error(known.sure, was_right),
        "pictures_never_taught": len(found),
        "by_default": {"false_alarms": mean(known.label == asked.concepts), "found": mean(found)},
        **{f"at_threshold_of_{k}": _found(*row) for k, row in zip(Judged.SCORES, at, strict=True)},
    }


def _found(false_alarms: float, found: float) -> dict[str, float]:
    return {"false_alarms": round(false_alarms, 4), "found": round(found, 4)}


def part_levers(work: Work) -> dict[str, Curve]:
    """Each lever on top of the one before, the last being ours; all on one table."""
    asked, engine, seed_of_draws, tables = work.asked, work.engine(work.asked.engine), work.judging.seed, []
    for seed, adapter in work.adapters.items():
        do = partial(_each, partial(Levers.measure, work.labels(engine, adapter), seed_of_draws, asked.pairs))
        depends = {"adapter": adapter.content_hash, "pairs": asked.pairs, "seed": seed_of_draws}
        depends |= {"engine": engine.kind, "precision": engine.precision}
        tables.append(work.staged(f"levers-{seed}", work.images(seed), 4, do, **depends)[0])
    t = Levers.timesteps(seed_of_draws, asked.pairs, work.base.spec.schedule.steps)
    return Levers(np.concatenate(tables), t, asked.truth, work.base.spec.elements).rows(work.judging)


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
        seen = ours(work, engine, adapter, work.closed, f"scaling-{count}", images)
        right_of_all = accuracy(seen.label, np.arange(count).repeat(each))
        row = {"labels": count, "steps": asked.label_steps, "pictures": len(images), "accuracy": right_of_all}
        rows.append({**row, **cost(seen), "reference_evaluations": asked.published.evaluations(count)})
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
    found = {f"at_threshold_of_{Judged.SCORES[0]}": _found(*np.mean(at, 0))}
    return {**right(asked, np.concatenate(labels)), "seconds_in_bulk": typical(np.concatenate(seconds)), **found}


def part_timing(work: Work) -> dict[str, float]:
    """Seconds of one picture alone: medians of rivals taking turns."""
    asked, seed, rivals = work.asked, work.asked.seeds[0], dict[str, Callable[[], object]]()
    adapter, images, closed = work.adapters[seed], work.images(seed), work.closed
    engines = [work.engine(kind) for kind in dict.fromkeys(("eager", asked.engine))]
    for engine in engines:
        labels, turns = work.labels(engine, adapter), [itertools.cycle(images) for _ in "ab"]
        rivals[f"reference {engine.kind}"] = partial(_published, labels, asked.published, turns[0])
        rivals[f"ours {engine.kind}"] = partial(_classify, engine, adapter, closed, turns[1])
    depends = {"judging": asdict(closed), "code": code(), "plan": asdict(asked.published), "rounds": asked.rounds}
    folder = work.folder("timing", adapter=adapter.content_hash, engines=[how(e) for e in engines], **depends)
    return once(folder / "seconds.json", lambda: medians(interleaved(rivals, asked.rounds)))


def _published(labels: Labels, plan: Published, turn: Iterator[Image.Image]) -> None:
    plan.errors(labels, next(turn))


def _classify(engine: Engine, adapter: Adapter, judging: Judging, turn: Iterator[Image.Image]) -> None:
    classify(engine, [next(turn)], adapter, judging)


def difference(asked: Asked, mine: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Of accuracies on the same pictures, with 95 % intervals: pictures drawn again, and whole concepts drawn again."""
    off = (mine == asked.truth).astype(float) - (theirs == asked.truth)
    by_concept = np.array([off[asked.truth == c].mean() for c in range(asked.concepts)])
    return {"mean": mean(off), "interval": interval(off), "interval_by_concept": interval(by_concept)}


def ratios(reference: dict[str, Any], mine: dict[str, Any], alone: dict[str, float]) -> dict[str, float]:
    """How many times what ours costs the reference does."""
    kinds = dict.fromkeys(("eager", mine["engine"]))
    made = {k: reference[k] / mine[k] for k in ("evaluations", "seconds_in_bulk")}
    made |= {"seconds_alone": alone["reference eager"] / alone[f"ours {mine['engine']}"]}
    made |= {f"seconds_alone_both_{kind}": alone[f"reference {kind}"] / alone[f"ours {kind}"] for kind in kinds}
    return {k: round(v, 1) for k, v in made.items()}


def result(work: Work) -> dict[str, Any]:
    """Everything that the line says."""
    asked, settings = work.asked, work.settings(0)
    alone, (reference, theirs), (mine, labels) = part_timing(work), part_reference(work), part_ours(work)
    return {
        "base": asked.base, "weights": work.base.spec.entry.fingerprint.weights[:12], "code": code(),
        "method": settings.method, "steps": settings.steps, "settings": asked.settings,
        "adapters": [adapter.content_hash[:12] for adapter in work.adapters.values()], "judging": asdict(work.judging),
        "concepts": asked.concepts, "near_twins": int(asked.twins.sum()), "seeds": len(asked.seeds),
        "pictures": len(asked.truth), "reference": reference, "ours": mine, "seconds_alone": alone,
        "ratios": ratios(reference, mine, alone), "difference": difference(asked, labels, theirs), "none": part_none(work),
        "levers": part_levers(work), "scaling": part_scaling(work), "encoder": part_encoder(work),
    }  # fmt: skip


PARTS: dict[str, Callable[[Work], Any]] = {
    "taught": part_taught, "timing": part_timing, "reference": part_reference, "ours": part_ours, "none": part_none,
    "levers": part_levers, "scaling": part_scaling, "encoder": part_encoder,
}  # fmt: skip


def table(line: dict[str, Any]) -> str:
    """Markdown: who is right at what cost, what it comes to, what each lever brings, and how cost grows with labels."""
    none, found = line["none"], f"at_threshold_of_{Judged.SCORES[0]}"
    rows = []
    for name, key in (("as published", "reference"), ("`classify`", "ours")):
        one, alone = line[key], {k.split()[1]: v for k, v in line["seconds_alone"].items() if k.startswith(key)}
        took = ", ".join(f"{s:.3g} ({kind})" for kind, s in alone.items())
        never = percent(none[found]["found"]) if key == "ours" else "–"
        twins, many = percent(one.get("near_twins")), f"{one['seconds_in_bulk']:.3g} ({one['engine']})"
        rows.append([name, percent(one["accuracy"]), twins, one["evaluations"], took, many, never])
    for name, one in line["encoder"].items():
        shares = [percent(s) for s in (one["accuracy"], one.get("near_twins"), one[found]["found"])]
        rows.append([name, *shares[:2], "–", "–", f"{one['seconds_in_bulk']:.3g}", shares[2]])
    head = ["", "right", "near-twins", "evaluations", "s, one alone", "s each, many", "never taught, found"]
    times, off = line["ratios"], line["difference"]
    low, high = off["interval"]
    said = (
        f"Difference in accuracy {off['mean']:+.1%} (95 % interval {low:+.1%} to {high:+.1%}) at 1/{times['evaluations']:g} of the"
        f" evaluations and 1/{times['seconds_alone']:g} of the time (1/{times['seconds_alone_both_eager']:g} both on eager)."
        f" Expected calibration error {none['calibration_error']:.3f}; false alarms {none[found]['false_alarms']:.1%}."
    )
    curves = {"as published": line["reference"]["curve"], **line["levers"]}
    wide = max(map(len, curves.values()))
    levers = [[k, *(f"{r:.1%} ({e:.0f})" for e, r in c), *[""] * (wide - len(c))] for k, c in curves.items()]
    keys = ("labels", "steps", "evaluations", "reference_evaluations", "seconds_in_bulk")
    scaling = [[*(row[k] for k in keys), percent(row["accuracy"])] for row in line["scaling"]]
    tables = [
        markdown(head, rows),
        markdown(["right (evaluations)", *[""] * wide], levers),
        markdown(["labels", "steps", "evaluations", "as published", "s each, many", "right"], scaling),
    ]
    return "\n\n".join([tables[0], said, *tables[1:]])


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def asked_of(given: argparse.Namespace) -> Asked:
    settings = {k: json.loads(v) if v[0].isdigit() else v for k, v in (s.split("=") for s in given.set)}
    quick = QUICK if given.quick else Asked()
    values = {k: v for k, v in vars(given).items() if k in Asked.__dataclass_fields__ and v is not None}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return replace(quick, **values, settings=quick.settings | settings)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--base")
    arguments.add_argument("--engine", choices=("eager", "onnx", "openvino"))
    arguments.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="of the engine, where not its own choice"
    )
    arguments.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the trainer, such as steps=300"
    )
    arguments.add_argument("--concepts", type=int)
    arguments.add_argument("--seeds", type=int, nargs="+")
    arguments.add_argument("--labels", type=int, nargs="+", help="numbers of labels to measure the cost at")
    arguments.add_argument("--label-steps", type=int, help="optimiser steps a concept for these")
    arguments.add_argument("--work", type=Path, default=ROOT / "build" / "labels")
    arguments.add_argument("--only", choices=PARTS, help="do one part, print what it found, keep no line")
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--table", action="store_true")
    given = arguments.parse_args()
    if given.table:
        print(table(json.loads((RESULTS / "labels.jsonl").read_text().splitlines()[-1])))
        return
    asked = asked_of(given)
    with closing(Work(given.work, asked, cpserve.load_base(asked.base))) as work:
        if given.only:
            print(PARTS[given.only](work))
            return
        line = result(work)
    print(table(line))
    if given.quick:
        print(json.dumps(line))
    else:
        keep("labels", line)


if __name__ == "__main__":
    main()
