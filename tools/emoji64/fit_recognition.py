"""The constants of `classify`'s odds, fitted on concepts that nothing else is measured on.

`python tools/emoji64/fit_recognition.py` teaches ten of the `fit` concepts in sequence, among them near-twins, and six in a
third of the steps, and measures unseen pictures of both, alone and with other things beside them, and of ten concepts never
taught under every label and draw. It searches the constants of `cpserve.elimination.Odds` that make the answers to all of them
likeliest, and says what the constants in use make of each kind of picture. What was learned and measured lies in
`$EMOJI64_WORK/recognition`; it resumes by itself.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sources import WORK
from write_model import SHIPPED

from adapter_store import Store
from benchmarks.error_tables import Labels, calibration_error, found_at, in_pairs, in_turn, raced
from benchmarks.staged import staged
from cpserve import load_base
from cpserve.adapter import Adapter, empty_adapter
from cpserve.base import BaseModel
from cpserve.concept import Concept, Picture
from cpserve.elimination import Odds
from cpserve.engines.eager import EagerEngine
from cpserve.prompts import Prompt
from cpserve.recognition import Judging, labels_of, latents_of
from cpserve.score import draws
from examples import TAUGHT_PLACES, UNSEEN_PLACES, cluttered, drawing_of, photo
from trainer import Record, Settings, learn

Places = tuple[Any, ...]
KNOWN = (
    ("fox", "noto"), ("fox", "twitter"), ("snowman", "joy"), ("horse", "noto"), ("sushi", "twitter"),
    ("factory", "joy"), ("pencil", "noto"), ("peach", "twitter"), ("fish", "joy"), ("saxophone", "noto"),
)  # fmt: skip
UNKNOWN = (
    ("chipmunk", "noto"), ("baby chick", "twitter"), ("pear", "joy"), ("scissors", "noto"), ("fire", "twitter"),
    ("stop sign", "joy"), ("mountain", "noto"), ("pushpin", "twitter"), ("spaghetti", "joy"), ("coffin", "noto"),
)  # fmt: skip
WEAK = (
    ("horse", "joy"), ("sushi", "noto"), ("saxophone", "twitter"), ("oncoming taxi", "noto"), ("baby chick", "joy"),
    ("fire", "noto"),
)  # fmt: skip
SEQUENCES = {"ten": (KNOWN, 300), "weak": (WEAK, 100)}
"""Subjects in order, and the steps that each is taught for."""
TAUGHT, EACH = 6, 8
KINDS = ((photo, (0, 15)), (cluttered, (0, 20)))
"""Who takes the pictures, turned by how many degrees."""
FACTORS = (0.6, 0.8, 1.25, 1.6)
"""What a constant is tried at, times its value."""


def photos(
    seed: int,
    subject: tuple[str, str],
    places: Places,
    count: int,
    turn: tuple[int, int],
    take: Callable[..., bytes] = photo,
) -> list[Image.Image]:
    rng, drawing = np.random.default_rng((23, seed)), drawing_of(*subject)
    made = [take(rng, drawing, places[i % len(places)], turn) for i in range(count)]
    return [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in made]


def taught(base: BaseModel, name: str, work: Path) -> Adapter:
    """The adapter after all of a sequence."""
    store, (subjects, steps) = Store(work / "store"), SEQUENCES[name]
    for number, subject in enumerate(subjects):
        if store.head(name) > number:
            continue
        start = empty_adapter(base.spec.entry)
        if number:
            version = store.version(name)
            start = Adapter.read(version.manifest, version.read, for_training=True)
        images = photos(number, subject, TAUGHT_PLACES, TAUGHT, (0, 10))
        concept = Concept(f"thing{number}", tuple(Picture(f"{i}.jpg", image) for i, image in enumerate(images)))
        record = Record(work / f"run-{name}-{number}")
        adapter = learn(base, concept, start, Settings(steps=steps), record)
        store.commit(name, adapter.files(), adapter.manifest, expected_head=number)
        record.delete()
        print(f"{name}: learned {number + 1} of {len(subjects)}", flush=True)
    version = store.version(name)
    return Adapter.read(version.manifest, version.read)


@dataclass(frozen=True, eq=False)
class Measured:
    """Error maps `[P,D,L+1,h,w]` of pictures, c_0 the last label, and the `truth [P]`, L being none."""

    maps: np.ndarray
    truth: np.ndarray
    elements: int

    def judged(self, odds: Odds, *, none: bool = True) -> tuple[np.ndarray, np.ndarray, float]:
        """What `classify` makes of them, or of the known ones among the known labels: `p [P,L+1]`, `label [P]`, mean evaluations."""
        maps = self.maps if none else self.maps[self.known]
        races = [raced(one, self.elements, Judging(none=none), odds) for one in maps]
        label = np.array([race.label for race in races])
        return np.array([race.probabilities for race in races]), label, float(np.mean([r.evaluations for r in races]))

    @property
    def known(self) -> np.ndarray:
        """`[P]` bool."""
        known: np.ndarray = self.truth < self.maps.shape[2] - 1
        return known

    def log_loss(self, odds: Odds) -> float:
        p = self.judged(odds)[0][np.arange(len(self.truth)), self.truth]
        return float(-np.log(np.maximum(p, 1e-6)).mean())

    def told(self, odds: Odds) -> dict[str, float]:
        (p, label, evaluations), known = self.judged(odds), self.known
        _, among, spent = self.judged(odds, none=False)
        found = found_at(0.05, p[known, -1], p[known, -1], p[~known, -1])[1]
        said = {
            "right_of_known": (label == self.truth)[known].mean(), "taken_for_none": (label == p.shape[1] - 1)[known].mean(),
            "found_unknown": (label == self.truth)[~known].mean(), "found_at_5_percent": found,
            "calibration_error": calibration_error(p.max(1), label == self.truth), "evaluations": evaluations,
            "right_among_known": (among == self.truth[known]).mean(), "evaluations_among_known": spent,
            "log_loss": self.log_loss(odds),
        }  # fmt: skip
        return {k: round(float(v), 4) for k, v in said.items()}


def measured(base: BaseModel, name: str, take: Callable[..., bytes], turn: tuple[int, int], work: Path) -> Measured:
    judging, (known, steps) = Judging(), SEQUENCES[name]
    never = [subject for subject in UNKNOWN if subject[0] not in {thing for thing, _ in known}]
    adapter, subjects = taught(base, name, work), (*known, *never)
    images = [p for i, s in enumerate(subjects) for p in photos(200 + i, s, UNSEEN_PLACES, EACH, turn, take)]
    spec, length = base.spec, base.spec.schedule.steps
    shape = (spec.channels, spec.latent_size, spec.latent_size)
    plan = draws(judging.seed, judging.draws // 2, shape, judging.low * length, judging.high * length)
    with EagerEngine(base) as engine:
        labels = Labels.of(engine, [Prompt(text, adapter) for text in labels_of(adapter, judging).values()])

        def maps(some: Sequence[Image.Image]) -> np.ndarray:
            return np.stack([in_pairs(labels.maps(z, plan)) for z in latents_of(engine, some)])

        drawn = f"{judging.draws}-{judging.low:g}-{judging.high:g}-{judging.seed}"
        made, _ = staged(work / f"{name}-{steps}-{take.__name__}-{drawn}", images, EACH, maps)
    truth = np.minimum(np.arange(len(subjects)), len(known)).repeat(EACH)
    return Measured(in_turn(made, plan.t[::2].numpy(), judging.middle * length), truth, spec.elements)


def fitted(seen: Sequence[Measured], odds: Odds) -> Odds:
    """One constant after the other is moved for as long as the mean log loss falls."""

    def loss(tried: Odds) -> float:
        return float(np.mean([one.log_loss(tried) for one in seen]))

    best, before = loss(odds), np.inf
    while best < before:
        before = best
        for name, factor in itertools.product(asdict(odds), FACTORS):
            tried = replace(odds, **{name: getattr(odds, name) * factor})
            if (lost := loss(tried)) < best:
                best, odds = lost, tried
        print(f"log loss {best:.4f} at {odds}", flush=True)
    return odds


def main() -> None:
    base = load_base(str(SHIPPED))
    work = WORK / "recognition" / base.spec.entry.fingerprint.weights[:12]
    work.mkdir(parents=True, exist_ok=True)
    seen = {
        f"{name}, {take.__name__}": measured(base, name, take, turn, work)
        for name, (take, turn) in itertools.product(SEQUENCES, KINDS)
    }
    print(json.dumps({name: one.told(Odds()) for name, one in seen.items()}), flush=True)
    odds = fitted(list(seen.values()), Odds())
    print(json.dumps({"fitted": asdict(odds)} | {name: one.told(odds) for name, one in seen.items()}))


if __name__ == "__main__":
    main()
