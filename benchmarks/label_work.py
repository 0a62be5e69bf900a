"""What the recognition benchmark asks about, learned and kept: concepts, their pictures, adapters, engines.

Everything lies in the work folder by what it depends on, so that a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "emoji64"))
from adapter_store import Store
from benchmarks.error_tables import Labels, Published
from benchmarks.forgetting_runs import LEARNING, sources
from benchmarks.staged import Progress, staged
from cpserve.adapter import Adapter, empty_adapter
from cpserve.base import BaseModel
from cpserve.concept import Concept, Picture
from cpserve.engine import Engine, open_engine
from cpserve.prompts import Prompt
from cpserve.recognition import Judging, labels_of
from examples import TAUGHT_PLACES, UNSEEN_PLACES, cluttered, drawing_of, photo
from export.build import plan_export
from export.target import Target
from trainer import Record, Settings, learn

ROOT = Path(__file__).parents[1]
Images = Sequence[Image.Image]
Subject = tuple[str, str]
"""A thing and the style that it is drawn in."""

KNOWN: tuple[Subject, ...] = (
    ("rabbit face", "noto"), ("rabbit face", "twitter"), ("baseball", "noto"), ("cookie", "twitter"), ("drum", "joy"),
    ("crab", "twitter"), ("crab", "joy"), ("lizard", "noto"), ("telescope", "twitter"), ("red apple", "twitter"),
    ("red apple", "joy"), ("palm tree", "joy"), ("monkey", "noto"), ("monkey", "joy"), ("hot beverage", "noto"),
    ("tulip", "noto"), ("tulip", "twitter"), ("ice cream", "twitter"), ("fire engine", "joy"), ("fire engine", "noto"),
)  # fmt: skip
NEVER_TAUGHT: tuple[Subject, ...] = (
    ("bed", "noto"), ("tomato", "twitter"), ("bicycle", "joy"), ("cheese wedge", "twitter"), ("jeans", "joy"),
    ("lollipop", "noto"), ("rose", "twitter"), ("shrimp", "joy"), ("snowman without snow", "noto"), ("ant", "twitter"),
    ("canoe", "joy"), ("joystick", "noto"), ("beer mug", "twitter"), ("headphone", "joy"), ("pen", "noto"),
    ("ring", "twitter"), ("taco", "joy"), ("spoon", "noto"), ("turkey", "twitter"), ("motorcycle", "joy"),
)  # fmt: skip
TURNS = ("noto", "twitter", "joy")
TAUGHT = 6


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured; the defaults are the full run."""

    base: str = "builtin:emoji64"
    engine: str = "openvino"
    precision: str = "float32"
    """Of the engine; the reference's own, so that every CPU's lines can stand together."""
    concepts: int = 20
    each: int = 10
    """Pictures of a concept."""
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: dict[str, Any] = field(default_factory=dict)
    """The trainer's, where they are not its defaults."""
    published: Published = field(default_factory=Published)
    draws: int | None = None
    """Of ours, where not its default."""
    pairs: int = 32
    """Of draws in the levers' table."""
    labels: tuple[int, ...] = (2, 5, 10, 20, 50, 100)
    label_steps: int = 100
    """Optimiser steps a concept for these."""
    label_pictures: int = 200
    """At most so many at each number of labels."""
    rounds: int = 5
    """Pictures that the rivals take turns at."""

    @property
    def known(self) -> tuple[Subject, ...]:
        return subjects()[: self.concepts]

    @property
    def twins(self) -> np.ndarray:
        """`[concepts]` bool: whose thing is there in another style, too."""
        things = [thing for thing, _ in self.known]
        return np.array([things.count(thing) > 1 for thing in things])

    @property
    def truth(self) -> np.ndarray:
        """`[pictures]`: the label of each known picture, seed after seed."""
        return np.tile(np.arange(self.concepts).repeat(self.each), len(self.seeds))


QUICK = Asked(
    engine="onnx", concepts=3, each=2, seeds=(0, 1), settings={"steps": 6, "variants": 2}, draws=8, pairs=8,
    published=Published(first=4, total=12, keep=2), labels=(2, 4), label_steps=3, label_pictures=6, rounds=1,
)  # fmt: skip


@cache
def subjects() -> tuple[Subject, ...]:
    """Concepts in the order in which they are taught: KNOWN, then the other test concepts, then these in another style."""
    test = json.loads((ROOT / "tools" / "emoji64" / "split.json").read_text())["test"]
    used = {thing for thing, _ in (*KNOWN, *NEVER_TAUGHT)}
    others = [thing for thing in test if thing not in used]
    rounds = [[(thing, TURNS[(i + turn) % 3]) for i, thing in enumerate(others)] for turn in range(2)]
    return (*KNOWN, *itertools.chain(*rounds))


def pictures(subject: Subject, seed: int, purpose: str, count: int) -> Images:
    """To teach from (`taught`), to ask about (`asked`), or to fit a threshold on (`fitted`)."""
    stream = (31, seed, (*subjects(), *NEVER_TAUGHT).index(subject), ("taught", "asked", "fitted").index(purpose))
    rng = np.random.default_rng(stream)
    take, places, turn = (photo, TAUGHT_PLACES, (0, 10)) if purpose == "taught" else (cluttered, UNSEEN_PLACES, (0, 20))
    made = [take(rng, drawing_of(*subject), places[i % len(places)], turn) for i in range(count)]
    return [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in made]


@dataclass(frozen=True, eq=False)
class Work:
    """The run: its folder, what was asked, the base and its engines. Parts lie in the folder by what they depend on."""

    root: Path
    asked: Asked
    base: BaseModel
    results: Path
    """The folder that lines are kept in."""
    engines: dict[str, Engine] = field(default_factory=dict)

    @property
    def judging(self) -> Judging:
        """`classify`'s defaults."""
        usual = Judging()
        return replace(usual, draws=self.asked.draws or usual.draws)

    @property
    def closed(self) -> Judging:
        """The same without "none of these", as the reference is asked."""
        return replace(self.judging, none=False)

    @cached_property
    def adapters(self) -> dict[int, Adapter]:
        """By seed, after all concepts."""
        return {seed: self.taught(seed, self.asked.concepts) for seed in self.asked.seeds}

    def folder(self, what: str, **depends: Any) -> Path:
        key = json.dumps([self.base.spec.entry.fingerprint.weights, depends], sort_keys=True)
        return self.root / f"{what}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

    def staged(
        self, what: str, images: Images, size: int, do: Callable[[Images], np.ndarray], **depends: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `do` makes of pictures, `size` at a time, and the seconds of each."""
        digest = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()
        return staged(self.folder(what, pictures=digest, **depends), images, size, do)

    def settings(self, seed: int, steps: int | None = None) -> Settings:
        return Settings.of({**self.asked.settings, "seed": seed} | ({"steps": steps} if steps else {}))

    def taught(self, seed: int, count: int, steps: int | None = None) -> Adapter:
        """The adapter that has learned the first `count` subjects in sequence."""
        settings = self.settings(seed, steps)
        folder = self.folder(f"taught-{settings.steps}-{seed}", settings=settings.dump(), sources=sources(LEARNING))
        store, lock = Store(folder), folder.with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # one process teaches, and who else needs it waits
            self._teach(store, seed, count, settings)
        version = store.version(f"labels@v{count}")
        return Adapter.read(version.manifest, version.read)

    def _teach(self, store: Store, seed: int, count: int, settings: Settings) -> None:
        done = min(store.head("labels"), count)
        progress = Progress(f"teaching, seed {seed}, {settings.steps} steps", count, done)
        for number in range(done, count):
            start = empty_adapter(self.base.spec.entry)
            if number:
                version = store.version("labels")
                start = Adapter.read(version.manifest, version.read, for_training=True)
            images = pictures(subjects()[number], seed, "taught", TAUGHT)
            concept = Concept(f"thing{number}", tuple(Picture(f"{i}.jpg", image) for i, image in enumerate(images)))
            record = Record(store.root / f"run-{number}")
            adapter = learn(self.base, concept, start, settings, record, resume=True)
            store.commit("labels", adapter.files(), adapter.manifest, expected_head=number)
            record.delete()
            progress.step()

    def images(self, seed: int, purpose: str = "asked", of: Sequence[Subject] = ()) -> Images:
        return [p for subject in of or self.asked.known for p in pictures(subject, seed, purpose, self.asked.each)]

    def engine(self, kind: str) -> Engine:
        """Opened once; a bundle is made once."""
        if kind not in self.engines:
            how = {"engine": "eager"}
            if kind != "eager":
                folder, precision = self.folder(f"bundle-{kind}", precision=self.asked.precision), self.asked.precision
                target = Target(runner=kind, precision=precision, slopes=True)  # type: ignore[arg-type]
                how = {"bundle": str(plan_export(self.base, folder, target).execute(print).root)}
            self.engines[kind] = open_engine(self.asked.base, **how, threads=torch.get_num_threads())
        return self.engines[kind]

    def labels(self, engine: Engine, adapter: Adapter, judging: Judging) -> Labels:
        """The known ones, and c_0 where "none of these" may be the answer."""
        return Labels.of(engine, [Prompt(text, adapter) for text in labels_of(adapter, judging).values()])

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()
