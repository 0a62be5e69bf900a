"""What is left of concepts when others were learned after them? One method, one order, one seed a run; one JSON line a run.

Held-out concepts are taught in sequence to the built-in base. After each, every concept so far is drawn under prompts that
occur neither in training nor among the protected ones; Lite0 features of those pictures and of the concept's unseen pictures,
as the base's autoencoder renders them, give docs/METHOD.md's measures. Diffusion-classifier accuracy: unseen pictures among
all concepts so far, when each was learned and at the end. Two bounds: `alone` teaches each concept by itself (`per-concept`:
nothing can be forgotten), `joint` all of them at once, with as many steps as the sequence has.

`--two` asks for two concepts in one picture: how many of 100 show both (`pairs.py` judges), drawn by the method's one adapter, or
by the sum of the two updates of `alone`.

    python benchmarks/forgetting.py --method null-space --order 0 --seed 0 [--concepts 10]
    python benchmarks/forgetting.py --quick             # three concepts, two methods, under ten minutes
    python benchmarks/forgetting.py --sweep             # every method at four settings on six sweep concepts, as --all
    python benchmarks/forgetting.py --all               # every run that results/forgetting.jsonl lacks; one thread a process pays
    python benchmarks/forgetting.py --table             # the README's table from the committed lines
    python benchmarks/forgetting.py --two [--method null-space] [--seed 0]      # one line in results/pairs.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
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
from benchmarks.joint import learn_jointly
from benchmarks.lite0 import JUDGE, Classes, lite0_layout
from benchmarks.pairs import measure
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
from trainer import METHODS, Record, Settings, learn
from trainer.lora import fold

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "forgetting.jsonl"
SOURCES = (
    "trainer/**/*.py",
    "cpserve/score.py",
    "cpserve/prompt_kv.py",
    "cpserve/schedule.py",
    "cpserve/sample.py",
    "cpserve/drawing.py",
    "cpserve/evaluation.py",
    "cpserve/measures.py",
    "cpserve/features.py",
    "cpserve/recognition.py",
    "cpserve/elimination.py",
    "benchmarks/teach.py",
    "benchmarks/lite0.py",
    "benchmarks/joint.py",
)
BOUNDS = ("alone", "joint")
CONCEPTS = {
    "test": (
        "baseball", "crab", "bicycle", "cookie", "drum", "fire engine", "jeans", "lizard", "rose", "telescope",
        "ant", "canoe", "hot beverage", "snowman without snow", "palm tree", "joystick", "ice cream", "monkey",
        "lollipop", "tulip", "shrimp", "bed", "rabbit face", "red apple", "cheese wedge",
    ),
    "sweep": (
        "anchor", "Christmas tree", "shark", "watermelon", "egg", "hot springs",
        "party popper", "rocket", "cat face", "rice cracker",
    ),
}  # fmt: skip
ORDERS, SEEDS = (0, 1), (0, 1, 2)
SWEPT_CONCEPTS = 6
_RATES = ("factor_rate=5e-4", "factor_rate=1e-3", "factor_rate=2e-3", "factor_rate=4e-3")
_LAMBDAS = ("ewc_lambda=1e2", "ewc_lambda=1e3", "ewc_lambda=1e4", "ewc_lambda=1e5")
SWEPT = {
    "none": _RATES,
    "fold": _RATES,
    "ewc": _LAMBDAS,
    "ewc-dc": _LAMBDAS,
    "dsc": tuple(f"dsc_scores={scores} dsc_eps={eps}" for eps in (1.0, 10.0) for scores in (0.01, 0.1)),
    "dsc+ewc-dc": tuple(f"ewc_lambda={weight} dsc_scores={scores}" for scores in (0.01, 0.1) for weight in (1e3, 1e4)),
    "c-lora": ("c_lora_lambda=10", "c_lora_lambda=1e2", "c_lora_lambda=1e3", "c_lora_lambda=1e4"),
    "null-space": ("null_energy=1e-4", "null_energy=1e-3", "null_energy=1e-2", "null_energy=5e-2"),
}
"""What is tried of each method on the sweep concepts: as many runs for each."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: which concepts in which order, taught how."""

    method: str
    order: int
    seed: int
    concepts: int
    split: str
    settings: Settings

    @property
    def names(self) -> list[str]:
        names = list(CONCEPTS[self.split][: self.concepts])
        return [names[i] for i in np.random.default_rng(self.order).permutation(len(names))] if self.order else names

    def key(self, base: BaseModel) -> dict[str, Any]:
        given = {k: v for k, v in self.settings.dump().items() if v != Settings().dump()[k] or k == "steps"}
        return {
            "benchmark": "forgetting", "method": self.method, "order": self.order, "seed": self.seed, "concepts": self.concepts,
            "split": self.split, "settings": given, "base": base.spec.entry.fingerprint.weights[:12], "sources": sources(),
        }  # fmt: skip


def sources() -> str:
    """A hash of the code that a result depends on."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in SOURCES for p in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


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


def run(base: BaseModel, asked: Run, folder: Path) -> dict[str, Any]:
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
            parts = [evaluate(engine, [a], encode, real, each=EACH, steps=STEPS) for a in adapters]
            drawn = {j: part.pictures[0][0] for j, part in enumerate(parts)}
            seen = [classes.right(lite0_layout(images, *JUDGE), j) for j, images in drawn.items()]
            near = [part.alignment[0][0] for part in parts]
            measured = {
                "alignment": _mean(near),
                "last_alignment": round(near[-1], 4),
                "recognised": _mean(seen),
            }
            return measured | {"by_concept": near, "seconds": _mean(seconds)} | how
        if asked.method == "joint":
            measured = evaluate_joint(engine, adapters[0], real, classes)
            return measured | {"seconds": seconds[0]} | how
        whole = evaluate(engine, adapters, encode, real, each=EACH, steps=STEPS)
    n = len(made)
    seen = {
        j: [classes.right(lite0_layout(images, *JUDGE), i) for i, images in row.items()]
        for j, row in whole.pictures.items()
    }
    metrics = [a.manifest.metrics for a in adapters]
    return {
        **whole.summary(),
        "last_alignment": round(whole.alignment[n - 1][n - 1], 4),
        "recognised_learned": _mean([seen[i][i] for i in range(n)]),
        "recognised": _mean(seen[n - 1]),
        "seconds": _mean(seconds),
        "training_bytes": sum(t.nbytes for group in adapters[-1].training.values() for t in group.values()),
        "adapter_bytes": sum(t.nbytes for t in adapters[-1].lora.values()),
        "kv_change": [m["largest_kv_change"] for m in metrics],
        "update_l1": [m["update_l1"] for m in metrics],
        "own_dc_accuracy": [m["own_dc_accuracy"] for m in metrics],
        "alignment_matrix": [[round(v, 3) for v in row.values()] for row in whole.alignment.values()],
        "kept_matrix": [[round(v, 3) for v in row.values()] for row in whole.kept.values()],
        "recognised_matrix": [[round(v, 3) for v in row] for row in seen.values()],
    } | how


def evaluate_joint(
    engine: Engine, adapter: Adapter, real: dict[str, list[Image.Image]], classes: Classes
) -> dict[str, Any]:
    """What `evaluate` says of the last version, of one with none before it. `real` and `classes` are in the concepts' order."""
    encode = encoder_for("builtin:")[1]
    texts = [wording.format(token) for token in adapter.tokens for wording in EVALUATED for _ in range(EACH)]
    each = len(EVALUATED) * EACH
    drawn = draw(engine, [*texts, *UNRELATED], adapter, STEPS, each)
    prior, rows = encode(draw(engine, UNRELATED, None, STEPS, each)), encode(drawn)
    groups = rows[: len(texts)].reshape(len(real), each, -1)
    known = [encode(rendered(engine, pictures)) for pictures in real.values()]
    near = [alignment(*pair) for pair in zip(known, groups, strict=True)]
    layout = lite0_layout(drawn[: len(texts)], *JUDGE).reshape(len(real), each, -1)
    return {
        "alignment": _mean(near),
        "last_alignment": round(near[-1], 4),
        "recognised": _mean([classes.right(own, i) for i, own in enumerate(layout)]),
        "dc": _mean([dc_accuracy(engine, adapter, pictures, name) for name, pictures in real.items()]),
        "a_mmd": _mean([mmd2(*pair) for pair in zip(known, groups, strict=True)]),
        "drift": round(float(1 - (unit(prior) * unit(rows[len(texts) :])).sum(1).mean()), 4),
        "by_concept": near,
    }


def merged(first: Adapter, second: Adapter) -> Adapter:
    """Two adapters learned apart as one: the sum of their updates, and both tokens."""
    concepts = (*first.manifest.concepts, *second.manifest.concepts)
    manifest = Manifest(base=first.manifest.base, concepts=concepts, method="per-concept")
    return Adapter(manifest, fold(first.lora, second.lora), {**first.embeddings, **second.embeddings})


def two(base: BaseModel, asked: Run, count: int, folder: Path) -> dict[str, Any]:
    """Of `count` pictures under "a photo of <one> and <other>" by one adapter, and by two summed, how many show both."""
    every = CONCEPTS[asked.split]
    taught = [pictures(name, every.index(name))[0] for name in asked.names]
    apart = replace(asked, method="alone", settings=replace(asked.settings, method="none"))
    last = teach(base, asked, taught, folder / "single")[0][-1]
    alone = teach(base, apart, taught, folder / "alone")[0]
    arms = {"single": lambda _: last, "per-concept": lambda own: reduce(merged, (alone[i] for i in own))}
    classes = [*asked.names, *(name for name in every if name not in asked.names)]
    drawings = [drawing_of(name, STYLES[every.index(name) % len(STYLES)]) for name in classes]
    with fastest(base) as engine:
        return measure(engine, arms, len(taught), drawings, count, STEPS)


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def committed() -> list[dict[str, Any]]:
    """The result lines so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def do(base: BaseModel, asked: Run) -> None:
    """Run unless its line stands, or another process is at it, and append the line."""
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
            result = run(base, asked, Path(folder))
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as stream:
            stream.write(json.dumps(key | result) + "\n")
        print(json.dumps({k: v for k, v in (key | result).items() if not isinstance(v, list | dict)}), flush=True)


STEPS, EACH = 15, 3  # of drawing; pictures a wording
COLUMNS = (
    "alignment_learned", "alignment", "recognised_learned", "recognised", "dc_learned", "dc", "kept", "a_mmd", "f_mmd", "drift",
    "seconds",
)  # fmt: skip


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean and standard error over the runs of each method and setting."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        own = {k: v for k, v in line["settings"].items() if k not in {"seed", "method", "steps"}}
        name = line["method"] + (f" {own}" if own else "")
        groups.setdefault(f"{name} ({line['split']}, {line['concepts']})", []).append(line)
    rows = ["| method | runs | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, group in groups.items():
        cells = []
        for column in COLUMNS:
            values = [g[column] for g in group if g.get(column) is not None]
            error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cells.append(f"{np.mean(values):.3f}" + (f" ± {error:.3f}" if error else "") if values else "–")
        rows.append(f"| {name} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def settings_of(method: str, seed: int, given: Sequence[str]) -> Settings:
    trained = "none" if method in BOUNDS else method
    values = {k: json.loads(v) for k, v in (s.split("=") for s in given)}
    return Settings.of({**values, "method": trained, "seed": seed})


def swept(one: Run) -> list[Run]:
    """Every method at each of its settings on six sweep concepts: all methods' first settings, then their second, and so on."""
    return [
        replace(
            one, method=method, split="sweep", concepts=SWEPT_CONCEPTS, settings=settings_of(method, 0, given.split())
        )
        for settings in zip(*SWEPT.values(), strict=True)
        for method, given in zip(SWEPT, settings, strict=True)
    ]


def whole(one: Run, given: Sequence[str]) -> list[Run]:
    """Every method and bound in each order under each seed."""
    return [
        replace(one, method=method, order=order, seed=seed, settings=settings_of(method, seed, given))
        for seed in SEEDS
        for order in ORDERS
        for method in (*METHODS, *BOUNDS)
    ]


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
    arguments.add_argument("--two", action="store_true", help="two concepts in one picture")
    arguments.add_argument("--pictures", type=int, default=100, help="with --two: of two concepts, and as many of one")
    asked = arguments.parse_args()
    if asked.table:
        print(table([line for line in committed() if line["split"] == asked.split]))
        return
    base = cpserve.load_base()
    one = Run(
        method=asked.method or "null-space", order=asked.order, seed=asked.seed, concepts=asked.concepts, split=asked.split,
        settings=settings_of(asked.method or "null-space", asked.seed, asked.set),
    )  # fmt: skip
    if asked.two and asked.concepts < 3:
        arguments.error("--two tells a concept from a third one: --concepts 3 or more")
    if asked.two:
        with tempfile.TemporaryDirectory() as folder:
            keep("pairs", one.key(base) | {"benchmark": "pairs"} | two(base, one, asked.pictures, Path(folder)))
    elif asked.quick:
        quick = [
            replace(one, method=m, concepts=3, settings=settings_of(m, 0, ["steps=150"]))
            for m in ("none", "null-space")
        ]
        with tempfile.TemporaryDirectory() as folder:
            lines = [each.key(base) | run(base, each, Path(folder)) for each in quick]
        print(table(lines))
    else:
        for each in swept(one) if asked.sweep else whole(one, asked.set) if asked.all else [one]:
            do(base, each)


if __name__ == "__main__":
    main()
