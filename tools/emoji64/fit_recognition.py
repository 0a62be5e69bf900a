"""How `classify` should judge: measured on concepts that nothing else is measured on.

`python tools/emoji64/fit_recognition.py` teaches ten of the `fit` concepts in sequence, among them near-twins, and six in a
third of the steps, and measures unseen pictures of both, alone and with other things beside them, and those of ten concepts
never taught under every label and draw. It prints what each window of timesteps is worth, and the constants of
`cpserve/elimination.py` as the errors have them: NOISE from how a label's distance to the true one varies between looks, SPREAD
from how it varies between pictures, REGIONS from the evidence, in units of the unexplained noise, that 95 % of the known
pictures exceed and 95 % of those never taught do not. Last, what the program's own choice says of these pictures. What was
learned and measured lies in `$EMOJI64_WORK/recognition`; it resumes by itself.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sources import WORK
from write_model import SHIPPED

from adapter_store import Store
from benchmarks.error_tables import raced
from cpserve import load_base
from cpserve.adapter import Adapter, empty_adapter
from cpserve.base import BaseModel
from cpserve.concept import Concept, Picture
from cpserve.engines.eager import EagerEngine
from cpserve.recognition import Judging, measure
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
TAUGHT, EACH, DRAWS = 6, 8, 16
LOW, HIGH = 0.1, 0.7
WINDOWS = ((0.1, 0.7), (0.1, 0.6), (0.2, 0.7), (0.2, 0.6), (0.2, 0.5), (0.3, 0.7), (0.3, 0.6))


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
    """`errors` and `evidence [looks,pictures,labels]` at `t [looks]`, a share of the schedule; `truth [pictures]`, the last label
    being none.
    """

    errors: np.ndarray
    evidence: np.ndarray
    t: np.ndarray
    truth: np.ndarray
    elements: int

    def window(self, low: float, high: float) -> Measured:
        inside = (self.t >= low) & (self.t < high)
        return Measured(self.errors[inside], self.evidence[inside], self.t[inside], self.truth, self.elements)

    @property
    def known(self) -> np.ndarray:
        """`[pictures]` bool."""
        known: np.ndarray = self.truth < self.errors.shape[-1] - 1
        return known

    def one_look(self) -> float:
        """The share of known pictures that a look alone puts right among the known labels."""
        return float((self.errors[:, self.known, :-1].argmin(-1) == self.truth[self.known]).mean())

    def constants(self) -> tuple[float, float]:
        """NOISE and SPREAD, medians over pairs of known labels."""
        noise, spread = [], []
        for true, other in itertools.permutations(range(self.errors.shape[-1] - 1), 2):
            errors = self.errors[:, (self.truth == true) & self.known]
            if not errors.size:
                continue
            behind = errors[..., other] - errors[..., true]  # [looks,pictures]
            gap, varies = behind.mean(), behind.var(0, ddof=1).mean()
            noise.append(varies * self.elements / (gap * errors[..., true].mean()))
            spread.append(max(0.0, behind.mean(0).var(ddof=1) - varies / len(behind)) / gap**2)
        return float(np.median(noise)), float(np.median(spread)) ** 0.5

    def regions(self) -> tuple[float, float]:
        """The best label's evidence over the unexplained noise: what the known exceed, and what those never taught do not."""
        evidence, r = self.evidence.mean(0)[:, :-1].max(1), self.errors.mean(0).min(1) / self.elements
        known, never = (evidence / r)[self.known], (evidence / r)[~self.known]
        return float(np.quantile(known, 0.05)), float(np.quantile(never, 0.95))

    def judged(self) -> dict[str, float]:
        """What the first looks come to, as `classify` takes them."""
        looks, error, none = Judging().draws // 2, Judging().error, self.errors.shape[-1] - 1
        seen = zip(self.errors[:looks].swapaxes(0, 1), self.evidence[:looks].swapaxes(0, 1), strict=True)
        races = [raced(errors, error, self.elements, evidence) for errors, evidence in seen]
        label = np.array([race.probabilities().argmax() for race in races])
        return {
            "right_of_known": float((label == self.truth)[self.known].mean()),
            "false_alarms": float((label == none)[self.known].mean()),
            "found_unknown": float((label == none)[~self.known].mean()),
            "evaluations_a_label": float(np.mean([2 * (~np.isnan(race.errors)).sum() for race in races]) / (none + 1)),
        }


def measured(base: BaseModel, name: str, take: Callable[..., bytes], work: Path) -> Measured:
    file = work / f"{name}-{take.__name__}.npz"
    judging = Judging(draws=DRAWS, error=0, low=LOW, high=HIGH)
    length, (known, _) = base.spec.schedule.steps, SEQUENCES[name]
    never = [subject for subject in UNKNOWN if subject[0] not in {thing for thing, _ in known}]
    if not file.exists():
        adapter = taught(base, name, work)
        images = [
            p for i, s in enumerate((*known, *never)) for p in photos(100 + i, s, UNSEEN_PLACES, EACH, (0, 15), take)
        ]
        with EagerEngine(base) as engine:
            seen = measure(engine, images, adapter, judging, lambda done, all_: print(f"{done}/{all_}", flush=True))
        np.savez(file, seen=seen)
    t = draws(judging.seed, DRAWS // 2, (1, 1, 1), LOW * length, HIGH * length).t[::2].numpy() / length
    truth = np.minimum(np.arange(len(known) + len(never)), len(known)).repeat(EACH)
    return Measured(*np.moveaxis(np.load(file)["seen"], -1, 0), t, truth, base.spec.elements)


def main() -> None:
    base = load_base(str(SHIPPED))
    work = WORK / "recognition" / base.spec.entry.fingerprint.weights[:12]
    work.mkdir(parents=True, exist_ok=True)
    said: dict[str, Any] = {}
    for name, take in itertools.product(SEQUENCES, (photo, cluttered)):
        seen = measured(base, name, take, work)
        chosen = seen.window(Judging.low, Judging.high)
        noise, spread = chosen.constants()
        one_look = {f"{low:g}-{high:g}": round(seen.window(low, high).one_look(), 3) for low, high in WINDOWS}
        constants = {"noise": noise, "spread": spread, "regions": chosen.regions()}
        said[f"{name}, {take.__name__}"] = {"one_look": one_look, **constants, **chosen.judged()}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
