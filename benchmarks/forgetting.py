"""What is left of concepts when others were learned after them? One method, one order, one seed a run; one JSON line a run.

Held-out concepts are taught in sequence to the built-in base. After each, every concept so far is drawn under prompts that
occur neither in training nor among the protected ones; Lite0 features of those pictures and of the concept's unseen pictures,
as the base's autoencoder renders them, give the measures of `cpserve.measures`; drift is the mean cosine distance of pictures of
other things to what the base draws from the same noise. Diffusion-classifier accuracy: unseen pictures among all concepts so
far, when each was learned and at the end. Three references: `token` learns the words alone, `alone` teaches each concept by itself
(`per-concept`: in neither can anything be forgotten), `joint` all of them at once, with as many steps as the sequence has.

`--two` asks for two concepts in one picture: how many of 100 show both (`pairs.py` judges), drawn by the method's one adapter, or
by the sum of the two updates of `alone`.

    python benchmarks/forgetting.py --method null-space --order 0 --seed 0 [--concepts 10]
    python benchmarks/forgetting.py --quick             # three concepts, two methods, under ten minutes
    python benchmarks/forgetting.py --sweep             # every method at the settings of SWEPT on six sweep concepts, as --all
    python benchmarks/forgetting.py --all               # every run that results/forgetting.jsonl lacks; one thread a process pays
    python benchmarks/forgetting.py --table             # docs/forgetting.md's tables, of the committed lines; with --sweep its own
    python benchmarks/forgetting.py --sheet             # its picture, from what the runs drew
    python benchmarks/forgetting.py --two [--method null-space] [--seed 0]      # one line in results/pairs.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "emoji64"))
import cpserve
from benchmarks.forgetting_runs import (
    BOUNDS,
    CONCEPTS,
    ROOT,
    SWEPT_CONCEPTS,
    Run,
    chosen,
    swept,
    whole,
)
from benchmarks.forgetting_table import committed, table, tables
from benchmarks.joint import learn_jointly
from benchmarks.lite0 import JUDGE, Classes, lite0_layout
from benchmarks.pairs import measure
from benchmarks.strips import STRIPS, keep_strip, sheet
from benchmarks.teach import STYLES, pictures
from benchmarks.timing import keep
from cpserve.adapter import Adapter, empty_adapter
from cpserve.base import BaseModel
from cpserve.concept import Concept, Picture
from cpserve.engine import Engine, open_engine
from cpserve.engines.eager import EagerEngine
from cpserve.evaluation import EVALUATED, UNRELATED, dc_accuracy, draw, evaluate, rendered
from cpserve.features import encoder_for
from cpserve.manifest import Manifest
from cpserve.measures import alignment, mmd2, unit
from examples import drawing_of
from export.build import plan_export
from export.target import Target
from trainer import METHODS, Record, learn
from trainer.lora import fold


def teach(
    base: BaseModel, asked: Run, taught: Sequence[Sequence[Image.Image]], folder: Path
) -> tuple[list[Adapter], list[float]]:
    """The adapter after each concept, and the seconds that each took. `alone`: each concept by itself; `joint`: one adapter."""
    adapters, seconds = [empty_adapter(base.spec.entry)], []
    concepts = [
        Concept(f"thing{j}", tuple(Picture(f"{i}.jpg", image) for i, image in enumerate(images)))
        for j, images in enumerate(taught)
    ]
    if asked.method == "joint":
        began = time.monotonic()
        joint = learn_jointly(base, concepts, asked.settings, folder / "joint")
        return [joint], [(time.monotonic() - began) / len(taught)]
    for j, concept in enumerate(concepts):
        began = time.monotonic()
        start = adapters[0] if asked.method == "alone" else adapters[-1]
        record, past = Record(folder / str(j)), () if asked.method == "alone" else adapters[1:]
        adapters.append(learn(base, concept, start, asked.settings, record, past=past))
        record.delete()
        seconds.append(time.monotonic() - began)
        print(f"{asked.method} {j + 1}/{len(taught)}: {seconds[-1]:.0f} s, {adapters[-1].manifest.metrics}", flush=True)
    return adapters[1:], seconds


def fastest(base: BaseModel) -> Engine:
    """The engine that draws and judges: OpenVINO in bfloat16 where it is at hand, several times as fast as torch."""
    if find_spec("openvino") is None:
        return EagerEngine(base)
    place = ROOT / "build" / "forgetting-bundle"
    place.parent.mkdir(exist_ok=True)
    with FileLock(f"{place}.lock"):
        bundle = plan_export(base, place, Target(runner="openvino")).execute().root
    return open_engine(bundle=bundle, threads=torch.get_num_threads())


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run found, and what each concept looked like at its end."""

    line: dict[str, Any]
    pictures: list[Image.Image]


def run(base: BaseModel, asked: Run, folder: Path) -> Outcome:
    """Teach and measure; `alone` reports each concept as its own adapter draws it."""
    made = [pictures(name, CONCEPTS[asked.split].index(name)) for name in asked.names]
    adapters, seconds = teach(base, asked, [taught for taught, _ in made], folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    real = {f"thing{j}": others for j, (_, others) in enumerate(made)}
    encode = encoder_for("builtin:")[1]
    with fastest(base) as engine:
        how = {
            "peak_mb": peak,
            "threads": torch.get_num_threads(),
            "engine": engine.kind,
            "precision": engine.precision,
        }
        classes = Classes.of(np.stack([lite0_layout(rendered(engine, others), *JUDGE) for _, others in made]))
        if asked.method == "alone":
            parts = [evaluate(engine, [a], encode, real, each=EACH, steps=STEPS, shown=DRAWN) for a in adapters]
            drawn = {j: part.pictures[0][0] for j, part in enumerate(parts)}
            seen = [classes.right(lite0_layout(images, *JUDGE), j) for j, images in drawn.items()]
            near = [part.alignment[0][0] for part in parts]
            measured = {
                "alignment": _mean(near),
                "last_alignment": round(near[-1], 4),
                "recognised": _mean(seen),
                "by_concept": near,
                "seconds": _mean(seconds),
            }
            return Outcome(measured | how, [images[0] for images in drawn.values()])
        if asked.method == "joint":
            measured, images = evaluate_joint(engine, adapters[0], real, classes)
            return Outcome(measured | {"seconds": seconds[0]} | how, images)
        whole = evaluate(engine, adapters, encode, real, each=EACH, steps=STEPS, shown=DRAWN)
    n = len(made)
    seen = {
        j: [classes.right(lite0_layout(images, *JUDGE), i) for i, images in row.items()]
        for j, row in whole.pictures.items()
    }
    metrics = [a.manifest.metrics for a in adapters]
    line = {
        **whole.summary(),
        "last_alignment": round(whole.alignment[n - 1][n - 1], 4),
        "recognised_learned": _mean([seen[i][i] for i in range(n)]),
        "recognised": _mean(seen[n - 1]),
        "seconds": _mean(seconds),
        "training_bytes": sum(t.nbytes for group in adapters[-1].training.values() for t in group.values()),
        "adapter_bytes": sum(t.nbytes for t in adapters[-1].lora.values()),
        "kv_change": [m["largest_kv_change"] for m in metrics],
        "unseen_kv_change": [m["largest_unseen_kv_change"] for m in metrics],
        "update_l1": [m["update_l1"] for m in metrics],
        "own_dc_accuracy": [m["own_dc_accuracy"] for m in metrics],
        **{name: [m[name] for m in metrics] for name in ("dc_tau", "free_directions") if name in metrics[0]},
        "dc_by_concept": [round(v, 3) for v in whole.dc[n - 1].values()],
        "alignment_matrix": [[round(v, 3) for v in row.values()] for row in whole.alignment.values()],
        "kept_matrix": [[round(v, 3) for v in row.values()] for row in whole.kept.values()],
        "recognised_matrix": [[round(v, 3) for v in row] for row in seen.values()],
    }
    return Outcome(line | how, [images[0] for images in whole.pictures[n - 1].values()])


def evaluate_joint(
    engine: Engine, adapter: Adapter, real: dict[str, list[Image.Image]], classes: Classes
) -> tuple[dict[str, Any], list[Image.Image]]:
    """What `evaluate` says of the last version, of one with none before it, and a picture of each concept.

    `real` and `classes` are in the concepts' order.
    """
    encode = encoder_for("builtin:")[1]
    texts = [wording.format(token) for token in adapter.tokens for wording in EVALUATED for _ in range(EACH)]
    drawn = draw(engine, [*texts, *UNRELATED], adapter, STEPS, DRAWN)
    prior, rows = encode(draw(engine, UNRELATED, None, STEPS, DRAWN)), encode(drawn)
    groups = rows[: len(texts)].reshape(len(real), DRAWN, -1)
    known = [encode(rendered(engine, pictures)) for pictures in real.values()]
    near = [alignment(*pair) for pair in zip(known, groups, strict=True)]
    layout = lite0_layout(drawn[: len(texts)], *JUDGE).reshape(len(real), DRAWN, -1)
    measured = {
        "alignment": _mean(near),
        "last_alignment": round(near[-1], 4),
        "recognised": _mean([classes.right(own, i) for i, own in enumerate(layout)]),
        "dc": _mean([dc_accuracy(engine, adapter, pictures, name) for name, pictures in real.items()]),
        "a_mmd": _mean([mmd2(*pair) for pair in zip(known, groups, strict=True)]),
        "drift": round(float(1 - (unit(prior) * unit(rows[len(texts) :])).sum(1).mean()), 4),
        "by_concept": near,
    }
    return measured, drawn[: len(texts) : DRAWN]


def merged(first: Adapter, second: Adapter) -> Adapter:
    """Two adapters learned apart as one: the sum of their updates, and both tokens."""
    concepts = (*first.manifest.concepts, *second.manifest.concepts)
    manifest = Manifest(base=first.manifest.base, concepts=concepts, method="per-concept")
    return Adapter(manifest, fold(first.lora, second.lora), {**first.embeddings, **second.embeddings})


def two(base: BaseModel, asked: Run, count: int, folder: Path) -> dict[str, Any]:
    """Of `count` pictures under "a photo of a <one> and a <other>" by one adapter, and by two summed, how many show both."""
    every = CONCEPTS[asked.split]
    taught = [pictures(name, every.index(name))[0] for name in asked.names]
    alone_settings = replace(chosen("alone", asked.seed), steps=asked.settings.steps)
    apart = replace(asked, method="alone", settings=alone_settings)
    last = teach(base, asked, taught, folder / "single")[0][-1]
    alone = teach(base, apart, taught, folder / "alone")[0]
    arms = {"single": lambda _: last, "per-concept": lambda own: reduce(merged, (alone[i] for i in own))}
    classes = [*asked.names, *(name for name in every if name not in asked.names)]
    drawings = [drawing_of(name, STYLES[every.index(name) % len(STYLES)]) for name in classes]
    with fastest(base) as engine:
        return measure(engine, arms, len(taught), drawings, count, STEPS)


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def do(asked: Run) -> None:
    """Run unless its line stands, or another process is at it, and append the line."""
    base = cpserve.load_base()
    key = asked.key(base)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"cpserve-forgetting-{name}.lock", blocking=False)
    try:
        lock.acquire()
    except TimeoutError:
        return
    with lock:
        if any(all(line.get(k) == v for k, v in key.items()) for line in committed()):
            return
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(base, asked, Path(folder))
        keep("forgetting", key | outcome.line)
        if (asked.split, asked.concepts, asked.order, asked.seed) == ("test", 10, 0, 0):
            keep_strip(asked.method, outcome.pictures)


def in_its_own_process(asked: Run) -> None:
    """`do` in a process of its own, so that the peak memory is this run's."""
    process = multiprocessing.get_context("spawn").Process(target=do, args=(asked,))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


STEPS, EACH = 15, 3  # of drawing; pictures a wording
DRAWN = len(EVALUATED) * EACH


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--method", choices=(*METHODS, *BOUNDS))
    arguments.add_argument("--order", type=int, default=0)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--concepts", type=int, default=10)
    arguments.add_argument("--split", choices=tuple(CONCEPTS), default="test")
    arguments.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the trainer")
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--all", action="store_true")
    arguments.add_argument("--sweep", action="store_true")
    arguments.add_argument("--table", action="store_true")
    arguments.add_argument("--sheet", action="store_true")
    arguments.add_argument("--two", action="store_true", help="two concepts in one picture")
    arguments.add_argument("--pictures", type=int, default=100, help="with --two: of two concepts, and as many of one")
    asked = arguments.parse_args()
    if asked.sheet:
        taught = [pictures(name, i)[0][0] for i, name in enumerate(CONCEPTS["test"][:10])]
        keep_strip("taught", [image.resize((64, 64), Image.Resampling.LANCZOS) for image in taught])
        print(sheet(["taught", *(m for m in (*METHODS, *BOUNDS) if (STRIPS / f"{m}.png").exists())]))
        return
    base = cpserve.load_base()
    one = Run(
        method=asked.method or "null-space", order=asked.order, seed=asked.seed, concepts=asked.concepts, split=asked.split,
        settings=chosen(asked.method or "null-space", asked.seed, asked.set),
    )  # fmt: skip
    runs = swept(one) if asked.sweep else whole(one, asked.set) if asked.all else [one]
    if asked.table:
        # a sweep is settled once; its rows tell with which code
        swept_lines = [x for x in committed() if (x["split"], x["concepts"]) == ("sweep", SWEPT_CONCEPTS)]
        print(tables(swept_lines) if asked.sweep else table(base, one, asked.set))
        return
    if asked.two and asked.concepts < 3:
        arguments.error("--two tells a concept from a third one: --concepts 3 or more")
    if asked.two:
        with tempfile.TemporaryDirectory() as folder:
            keep("pairs", one.key(base) | {"benchmark": "pairs"} | two(base, one, asked.pictures, Path(folder)))
    elif asked.quick:
        quick = [
            replace(one, method=m, concepts=3, settings=chosen(m, 0, ["steps=150"])) for m in ("none", "null-space")
        ]
        with tempfile.TemporaryDirectory() as folder:
            lines = [each.key(base) | run(base, each, Path(folder)).line for each in quick]
        print(tables(lines))
    else:
        for each in runs:
            in_its_own_process(each)


if __name__ == "__main__":
    main()
