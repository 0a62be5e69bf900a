"""What is left of concepts when others were learned after them? One method, one order, one seed a run; one JSON line a run.

Held-out concepts are taught in sequence to the built-in base. After each, every concept so far is drawn under prompts that
occur neither in training nor among the protected ones; Lite0 features of those pictures and of the concept's unseen pictures,
as the base's autoencoder renders them, give docs/METHOD.md's measures. Diffusion-classifier accuracy: unseen pictures among
all concepts so far, when each was learned and at the end. `alone` teaches each concept by itself (`per-concept`, a bound:
nothing can be forgotten).

    python benchmarks/forgetting.py --method null-space --order 0 --seed 0 [--concepts 10]
    python benchmarks/forgetting.py --quick             # three concepts, two methods, under ten minutes
    python benchmarks/forgetting.py --all               # every run that results/forgetting.jsonl lacks; one thread a process pays
    python benchmarks/forgetting.py --table             # the README's table from the committed lines
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "emoji64"))
import cpserve
from benchmarks.lite0 import JUDGE, lite0, lite0_layout, through_autoencoder
from benchmarks.teach import pictures, shares
from cpserve.adapter import Adapter, empty_adapter
from cpserve.base import BaseModel
from cpserve.concept import Concept, Picture
from cpserve.engines.eager import EagerEngine
from cpserve.measures import alignment, forgetting, mmd2
from trainer import METHODS, Record, Settings, learn

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "forgetting.jsonl"
SOURCES = (
    "trainer/**/*.py",
    "cpserve/score.py",
    "cpserve/prompt_kv.py",
    "cpserve/schedule.py",
    "benchmarks/teach.py",
    "benchmarks/lite0.py",
)
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
EVALUATED = ("an emoji of {}", "a picture of {} on a yellow background", "{} on a orange background", "this is {}")
UNRELATED = tuple(f"a picture of a {w}" for w in ("banana", "bear", "bus", "castle", "crown", "frog", "guitar", "hammer",
                  "house", "lion", "pizza", "penguin", "rainbow", "star", "taxi", "trophy"))  # fmt: skip
EACH, UNSEEN = 3, 12
ORDERS, SEEDS = (0, 1), (0, 1, 2)


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


@dataclass(frozen=True, eq=False)
class Judge:
    """Features of each concept's unseen pictures, and the base's own drawings of unrelated things."""

    base: BaseModel
    real: Sequence[np.ndarray]
    unseen: Sequence[Sequence[Image.Image]]
    layouts: np.ndarray
    prior: np.ndarray

    @classmethod
    def of(cls, base: BaseModel, unseen: Sequence[Sequence[Image.Image]]) -> Judge:
        with EagerEngine(base) as engine:
            rendered = [through_autoencoder(engine, images) for images in unseen]
        means = np.stack([lite0_layout(images, *JUDGE).mean(0) for images in rendered])
        return cls(base, [lite0(images) for images in rendered], unseen, means, lite0(_draw(base, UNRELATED, None)))

    def drawn(self, adapter: Adapter, token: str) -> list[Image.Image]:
        return _draw(self.base, [e.format(token) for e in EVALUATED for _ in range(EACH)], adapter)

    def recognised(self, images: Sequence[Image.Image], own: int) -> float:
        return shares(lite0_layout(images, *JUDGE), self.layouts, own)

    def drift(self, adapter: Adapter) -> float:
        """How far unrelated prompts went from what the base draws, seed by seed: the mean cosine distance."""
        return float(1 - (self.prior * lite0(_draw(self.base, UNRELATED, adapter))).sum(1).mean())

    def dc_right(self, adapter: Adapter, which: Sequence[int], names: Sequence[str]) -> dict[int, float]:
        """The share of concept i's unseen pictures that the diffusion classifier puts right, by i."""
        with EagerEngine(self.base) as engine:
            images = [image for i in which for image in self.unseen[i]]
            answers = cpserve.classify(engine, images, adapter, cpserve.Judging(draws=8, none=False))
        right = np.array([a.label == names[i] for a, i in zip(answers, np.repeat(list(which), UNSEEN), strict=True)])
        return dict(zip(which, right.reshape(-1, UNSEEN).mean(1).tolist(), strict=True))


def _draw(base: BaseModel, prompts: Sequence[str], adapter: Adapter | None) -> list[Image.Image]:
    with EagerEngine(base) as engine:
        rows = [cpserve.Prompt(p, adapter) for p in prompts]
        made = cpserve.generate(engine, rows, range(len(rows)), cpserve.Drawing(guidance=3.0, steps=15))
    return [d.image for d in made]


def run(base: BaseModel, asked: Run, folder: Path) -> dict[str, Any]:
    """Teach and measure; `m[j][i]` is concept i after j + 1 concepts."""
    all_names = asked.names
    made = [pictures(name, CONCEPTS[asked.split].index(name)) for name in all_names]
    judge = Judge.of(base, [others for _, others in made])
    tokens = [f"thing{i}" for i in range(len(all_names))]
    settings, alone = asked.settings, asked.method == "alone"
    adapter = empty_adapter(base.spec.entry)
    past: list[Adapter] = []
    aligned: dict[int, dict[int, float]] = {}
    seen: dict[int, dict[int, float]] = {}
    dc_learned, first, last, logs = {}, {}, {}, []
    for j, (taught, _) in enumerate(made):
        began = time.monotonic()
        record = Record(folder / str(j))
        concept = Concept(tokens[j], tuple(Picture(f"{i}.jpg", image) for i, image in enumerate(taught)))
        start = empty_adapter(base.spec.entry) if alone else adapter
        adapter = learn(base, concept, start, settings, record, past=() if alone else past)
        record.delete()
        past.append(adapter)
        metrics = adapter.manifest.metrics
        logs.append({"seconds": round(time.monotonic() - began, 1), **metrics})
        aligned[j], seen[j] = {}, {}
        for i in range(j + 1):
            if alone and i < j:
                continue
            images = judge.drawn(adapter, f"<{tokens[i]}>")
            features = lite0(images)
            first.setdefault(i, features)
            last[i] = features
            aligned[j][i], seen[j][i] = alignment(judge.real[i], features), judge.recognised(images, i)
        dc_learned |= judge.dc_right(adapter, [j], tokens) if not alone else {}
        print(f"{asked.method} {j + 1}/{len(made)} {all_names[j]}: {logs[-1]} recognised {seen[j]}", flush=True)
    n = len(made)
    if alone:
        aligned, seen = ({j: {i: m[i][i] for i in range(j + 1)} for j in range(n)} for m in (aligned, seen))
    mmd = [mmd2(judge.real[i], last[i]) for i in range(n)]
    kept = [mmd2(first[i], last[i]) for i in range(n - 1)]
    dc_end = {} if alone else judge.dc_right(adapter, range(n), tokens)
    return {
        "alignment_learned": _mean([aligned[i][i] for i in range(n)]),
        "alignment_end": _mean(aligned[n - 1].values()),
        "forgetting": round(forgetting(aligned), 4),
        "recognised_learned": _mean([seen[i][i] for i in range(n)]),
        "recognised_end": _mean(seen[n - 1].values()),
        "dc_learned": _mean(dc_learned.values()),
        "dc_end": _mean(dc_end.values()),
        "a_mmd": _mean(mmd),
        "f_mmd": _mean(kept),
        "drift": round(judge.drift(adapter), 4),
        "last_alignment": round(aligned[n - 1][n - 1], 4),
        "seconds": _mean([log["seconds"] for log in logs]),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "training_bytes": sum(t.nbytes for group in adapter.training.values() for t in group.values()),
        "adapter_bytes": sum(t.nbytes for t in adapter.lora.values()),
        "kv_change": [log["largest_kv_change"] for log in logs],
        "update_l1": [log["update_l1"] for log in logs],
        "aligned": [[round(v, 3) for v in row.values()] for row in aligned.values()],
        "recognised": [[round(v, 3) for v in row.values()] for row in seen.values()],
        "threads": torch.get_num_threads(),
    }


def _mean(values: Any) -> float | None:
    values = list(values)
    return round(float(np.mean(values)), 4) if values else None


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


COLUMNS = (
    "alignment_learned", "alignment_end", "recognised_learned", "recognised_end", "dc_learned", "dc_end", "a_mmd", "f_mmd",
    "drift", "seconds",
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
            values = [g[column] for g in group if g[column] is not None]
            error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cells.append(f"{np.mean(values):.3f}" + (f" ± {error:.3f}" if error else "") if values else "–")
        rows.append(f"| {name} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def settings_of(method: str, seed: int, given: Sequence[str]) -> Settings:
    trained = "none" if method == "alone" else method
    values = {k: json.loads(v) for k, v in (s.split("=") for s in given)}
    return Settings.of({**values, "method": trained, "seed": seed})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--method", choices=(*METHODS, "alone"))
    arguments.add_argument("--order", type=int, default=0)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--concepts", type=int, default=10)
    arguments.add_argument("--split", choices=tuple(CONCEPTS), default="test")
    arguments.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the trainer")
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--all", action="store_true")
    arguments.add_argument("--table", action="store_true")
    asked = arguments.parse_args()
    if asked.table:
        print(table([line for line in committed() if line["split"] == asked.split]))
        return
    base = cpserve.load_base()
    one = Run(
        method=asked.method or "null-space", order=asked.order, seed=asked.seed, concepts=asked.concepts, split=asked.split,
        settings=settings_of(asked.method or "null-space", asked.seed, asked.set),
    )  # fmt: skip
    if asked.quick:
        quick = [
            replace(one, method=m, concepts=3, settings=settings_of(m, 0, ["steps=150"]))
            for m in ("none", "null-space")
        ]
        with tempfile.TemporaryDirectory() as folder:
            lines = [each.key(base) | run(base, each, Path(folder)) for each in quick]
        print(table(lines))
    elif asked.all:
        for seed in SEEDS:
            for order in ORDERS:
                for method in (*METHODS, "alone"):
                    settings = settings_of(method, seed, asked.set)
                    do(base, replace(one, method=method, order=order, seed=seed, settings=settings))
    else:
        do(base, one)


if __name__ == "__main__":
    main()
