"""What is left of each concept after each later one: every version draws every concept that it knows, from the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cpserve.adapter import Adapter
from cpserve.drawing import Drawing, generate
from cpserve.engine import Engine, on_grid
from cpserve.features import Encoder
from cpserve.measures import alignment, forgetting, mmd2, unit
from cpserve.prompts import Prompt
from cpserve.recognition import ROWS, Judging, classify, latents_of

EVALUATED = ("an emoji of {}", "a picture of {} on a yellow background", "{} on a orange background", "this is {}")
"""Wordings that are neither learned under nor protected."""

UNRELATED = (
    "a picture of a banana", "a picture of a bear", "a picture of a bus", "a picture of a castle", "a picture of a crown",
    "a picture of a frog", "a picture of a guitar", "a picture of a hammer", "a picture of a house", "a picture of a lion",
    "a picture of a pizza", "a picture of a penguin", "a picture of a rainbow", "a picture of a star",
    "a picture of a taxi", "a picture of a trophy",
)  # fmt: skip
"""Prompts that no concept should change."""

Matrix = dict[int, dict[int, float]]
"""`m[j][i]`: concept i under the version after j + 1 concepts, i <= j."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """`kept` is the likeness (mean cosine, seed by seed) to what the concept looked like when learned: 1, nothing was forgotten.
    Its mean leaves out the last concept, which nothing came after; `dc` when learned is among the concepts known then.

    Against real pictures, for the concepts that have some: `alignment` (mean cosine), `a_mmd` (squared maximum mean
    discrepancy, at the end). `dc` is the share of them, or else of those drawn when learned, that diffusion-classifier scores
    put right among the version's concepts.
    `f_mmd` is between pictures when learned and at the end, `drift[j]` the mean cosine distance of unrelated prompts' pictures
    from the base's. `pictures[j][i]` are the first of those drawn.
    """

    concepts: tuple[str, ...]
    kept: Matrix
    alignment: Matrix
    dc: Matrix
    a_mmd: dict[int, float]
    f_mmd: dict[int, float]
    drift: list[float]
    pictures: dict[int, dict[int, list[Image.Image]]]

    def summary(self) -> dict[str, float | None]:
        """Means over concepts; None where there were no real pictures."""
        last = len(self.concepts) - 1
        whole = len(self.alignment[last]) == last + 1
        return {
            "kept": _mean(likeness for i, likeness in self.kept[last].items() if i < last),
            "alignment_learned": _mean(m for j, row in self.alignment.items() for i, m in row.items() if i == j),
            "alignment": _mean(self.alignment[last].values()),
            "forgetting": round(forgetting(self.alignment), 4) if whole else None,
            "a_mmd": _mean(self.a_mmd.values()),
            "f_mmd": _mean(self.f_mmd.values()),
            "dc_learned": _mean(m for j, row in self.dc.items() for i, m in row.items() if i == j),
            "dc": _mean(self.dc[last].values()),
            "drift": round(self.drift[-1], 4),
        }


def _mean(values: object) -> float | None:
    numbers = list(values)  # type: ignore[call-overload]
    return round(float(np.mean(numbers)), 4) if numbers else None


def evaluate(
    engine: Engine,
    versions: Sequence[Adapter],
    encode: Encoder,
    real: Mapping[str, Sequence[Image.Image]],
    *,
    each: int = 3,
    steps: int = 20,
    shown: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a lineage: `versions[j]` knows j + 1 concepts, those before it among them.

    `real` holds pictures by concept that were not learned from; `each` pictures are drawn under every wording, and of all of
    a concept's under a version `shown` are given back.
    """
    concepts = tuple(c.name for c in versions[-1].manifest.concepts)
    tokens, n = versions[-1].tokens, len(versions)
    features: dict[int, dict[int, np.ndarray]] = {}
    pictures: dict[int, dict[int, list[Image.Image]]] = {}
    seeds = len(EVALUATED) * each
    learned: dict[int, Sequence[Image.Image]] = {}
    drift, dc, prior = [], {}, unit(encode(draw(engine, UNRELATED, None, steps, seeds)))
    known = {i: encode(rendered(engine, real[name])) for i, name in enumerate(concepts) if real.get(name)}
    for j, version in enumerate(versions):
        texts = [[wording.format(token) for wording in EVALUATED for _ in range(each)] for token in tokens[: j + 1]]
        drawn = draw(engine, [*(text for group in texts for text in group), *UNRELATED], version, steps, seeds)
        rows = encode(drawn).reshape(len(drawn), -1)
        groups = rows[: -len(UNRELATED)].reshape(j + 1, seeds, -1)
        features[j] = dict(enumerate(groups))
        by_concept = {i: drawn[i * seeds : (i + 1) * seeds] for i in range(j + 1)}
        pictures[j] = {i: some[:shown] for i, some in by_concept.items()}
        drift.append(float(1 - (prior * unit(rows[-len(UNRELATED) :])).sum(1).mean()))
        learned[j] = real.get(concepts[j]) or by_concept[j]
        judged = range(n) if j == n - 1 else [j]
        dc[j] = {i: dc_accuracy(engine, version, learned[i], concepts[i]) for i in judged}
        if progress:
            progress(j + 1, n)
    end = features[n - 1]
    return Evaluation(
        concepts=concepts,
        kept={j: {i: _likeness(features[i][i], f) for i, f in row.items()} for j, row in features.items()},
        alignment={j: {i: alignment(known[i], f) for i, f in row.items() if i in known} for j, row in features.items()},
        dc=dc,
        a_mmd={i: mmd2(known[i], f) for i, f in end.items() if i in known and len(known[i]) > 1},
        f_mmd={i: mmd2(features[i][i], f) for i, f in end.items() if i < n - 1},
        drift=drift,
        pictures=pictures,
    )


def rendered(engine: Engine, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The middle square of pictures as the base's autoencoder renders them: as sharp as anything that it could draw.

    An encoder trained on photographs would otherwise judge sharpness before anything else.
    """
    parts = (pictures[start : start + ROWS] for start in range(0, len(pictures), ROWS))
    return [Image.fromarray(p.numpy()) for part in parts for p in on_grid(engine.decode(latents_of(engine, part)))]


def _likeness(a: np.ndarray, b: np.ndarray) -> float:
    return float((unit(a) * unit(b)).sum(1).mean())


def dc_accuracy(engine: Engine, version: Adapter, pictures: Sequence[Image.Image], name: str) -> float:
    answers = classify(engine, pictures, version, Judging(whole=True, template=EVALUATED[0]))
    return float(np.mean([answer.label == name for answer in answers]))


def draw(engine: Engine, texts: Sequence[str], adapter: Adapter | None, steps: int, cycle: int) -> list[Image.Image]:
    """One picture a text; seeds count up and begin again every `cycle`, so that each concept has the same ones."""
    seeds = [i % cycle for i in range(len(texts))]
    made = generate(engine, [Prompt(t, adapter) for t in texts], seeds, Drawing(guidance=3.0, steps=steps))
    return [d.image for d in made]
