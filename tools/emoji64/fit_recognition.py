"""How `classify` should judge on this base: fitted on concepts that nothing else is measured on.

`python tools/emoji64/fit_recognition.py` teaches ten of the `fit` concepts in sequence, among them near-twins, measures their
unseen pictures and those of ten concepts never taught under every label and draw, and writes `recognition.json` beside the
shipped model: the timesteps that tell most labels apart, the scale of "none of these" at which FALSE_ALARMS of the known
pictures are lost, and the sharpness under which probabilities are worth most (log loss). What was learned and measured lies in
`$EMOJI64_WORK/recognition`; it resumes by itself.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sources import WORK
from write_model import SHIPPED

from adapter_store import Store
from cpserve import load_base
from cpserve.adapter import Adapter, empty_adapter
from cpserve.base import BaseModel
from cpserve.concept import Concept, Picture
from cpserve.elimination import Race
from cpserve.engines.eager import EagerEngine
from cpserve.recognition import Judging, measure
from cpserve.score import draws
from examples import TAUGHT_PLACES, UNSEEN_PLACES, drawing_of, photo
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
TAUGHT, EACH, DRAWS, FALSE_ALARMS = 6, 8, 32, 0.05
WINDOWS = [(low, high) for low in (0.0, 0.1, 0.2, 0.3, 0.4) for high in (0.5, 0.6, 0.7, 0.8, 0.9) if high - low >= 0.3]


def photos(seed: int, subject: tuple[str, str], places: Places, count: int, turn: tuple[int, int]) -> list[Image.Image]:
    rng, drawing = np.random.default_rng((23, seed)), drawing_of(*subject)
    made = [photo(rng, drawing, places[i % len(places)], turn) for i in range(count)]
    return [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in made]


def taught(base: BaseModel, work: Path) -> Adapter:
    """The adapter after all of KNOWN."""
    store = Store(work / "store")
    for number, subject in enumerate(KNOWN):
        if store.head("fit") > number:
            continue
        start = empty_adapter(base.spec.entry)
        if number:
            version = store.version("fit")
            start = Adapter.read(version.manifest, version.read, for_training=True)
        images = photos(number, subject, TAUGHT_PLACES, TAUGHT, (0, 10))
        concept = Concept(f"thing{number}", tuple(Picture(f"{i}.jpg", image) for i, image in enumerate(images)))
        record = Record(work / f"run-{number}")
        adapter = learn(base, concept, start, Settings(), record)
        store.commit("fit", adapter.files(), adapter.manifest, expected_head=number)
        record.delete()
        print(f"learned {number + 1} of {len(KNOWN)}", flush=True)
    version = store.version("fit")
    return Adapter.read(version.manifest, version.read)


@dataclass(frozen=True, eq=False)
class Measured:
    """`errors [looks,pictures,labels]` and `t [looks]`, a share of the schedule; `truth [pictures]`, the last label being none."""

    errors: np.ndarray
    t: np.ndarray
    truth: np.ndarray

    def window(self, low: float, high: float) -> Measured:
        inside = (self.t >= low) & (self.t < high)
        return Measured(self.errors[inside], self.t[inside], self.truth)

    def scaled(self, none_scale: float) -> Measured:
        scale = np.ones(self.errors.shape[-1])
        scale[-1] = none_scale
        return Measured(self.errors * scale, self.t, self.truth)

    def accuracy(self) -> float:
        """Of known pictures among the known labels, each pair of draws alone: what one look is worth."""
        known = self.truth < self.errors.shape[-1] - 1
        return float((self.errors[:, known, :-1].argmin(-1) == self.truth[known]).mean())

    def none_scale(self) -> float:
        """The scale at which FALSE_ALARMS of the known pictures are taken for none of these."""
        known = self.truth < self.errors.shape[-1] - 1
        mean = self.errors.mean(0)[known]
        return float(np.quantile(mean[:, :-1].min(1) / mean[:, -1], 1 - FALSE_ALARMS))

    def margins(self) -> np.ndarray:
        """`[pictures,labels]`, in standard errors."""
        return np.array([Race(self.errors[:, i]).margins() for i in range(self.errors.shape[1])])

    def log_loss(self, sharpness: float) -> float:
        logits = -sharpness * self.margins()
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return float(-np.log(np.maximum(p[np.arange(len(p)), self.truth], 1e-12)).mean())


def measured(base: BaseModel, work: Path) -> Measured:
    file = work / "errors.npz"
    judging = Judging(draws=DRAWS, error=0, low=0, high=1)
    length = base.spec.schedule.steps
    if not file.exists():
        adapter = taught(base, work)
        images = [p for i, s in enumerate((*KNOWN, *UNKNOWN)) for p in photos(100 + i, s, UNSEEN_PLACES, EACH, (0, 15))]
        with EagerEngine(base) as engine:
            errors = measure(engine, images, adapter, judging, lambda done, all_: print(f"{done}/{all_}", flush=True))
        np.savez(file, errors=errors)
    t = draws(judging.seed, DRAWS // 2, (1, 1, 1), 0, length).t[::2].numpy() / length
    truth = np.minimum(np.arange(len(KNOWN) + len(UNKNOWN)), len(KNOWN)).repeat(EACH)
    return Measured(np.load(file)["errors"], t, truth)


def main() -> None:
    base = load_base(str(SHIPPED))
    work = WORK / "recognition" / base.spec.entry.fingerprint.weights[:12]
    work.mkdir(parents=True, exist_ok=True)
    seen = measured(base, work)
    low, high = max(WINDOWS, key=lambda w: seen.window(*w).accuracy())
    inside = seen.window(low, high)
    looks = Judging().draws // 2
    usual = Measured(inside.errors[:looks], inside.t[:looks], inside.truth)  # as many draws as `classify` takes
    none_scale = usual.none_scale()
    judged = usual.scaled(none_scale)
    sharpness = min(np.geomspace(0.05, 5, 60), key=judged.log_loss)
    label = judged.errors.mean(0).argmin(-1)
    unknown = judged.truth == len(KNOWN)
    fitted = {"low": low, "high": high, "none_scale": round(none_scale, 5), "sharpness": round(float(sharpness), 3)}
    found = {
        "one_pair": {f"{w[0]}-{w[1]}": round(seen.window(*w).accuracy(), 3) for w in WINDOWS},
        "right_of_known": float((label == judged.truth)[~unknown].mean()),
        "false_alarms": float((label == len(KNOWN))[~unknown].mean()),
        "found_unknown": float((label == len(KNOWN))[unknown].mean()),
    }
    text = {"weights": base.spec.entry.fingerprint.weights, "judging": fitted, "fitted_on": found}
    (SHIPPED / "recognition.json").write_text(json.dumps(text, indent=1) + "\n")
    print(json.dumps(text))


if __name__ == "__main__":
    main()
