"""Which runs `forgetting.py` is made of: concepts, orders, seeds, and every method's settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from cpserve.base import BaseModel
from trainer import METHODS, Settings

ROOT = Path(__file__).parents[1]
LEARNING = ("trainer/**/*.py", "cpserve/score.py", "cpserve/prompt_kv.py", "cpserve/schedule.py")
SOURCES = (
    *LEARNING,
    "cpserve/prompts.py",
    "cpserve/text_encoder.py",
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
BOUNDS = ("token", "alone", "joint")
"""What stands beside the methods. `token`: only words are learned (textual inversion, Gal et al. 2023), so that nothing is
forgotten; `alone`: each concept by itself; `joint`: all at once."""
ORDERLESS = ("token", "alone")
"""Those that know no order."""
_TEST = (
    "baseball", "crab", "bicycle", "cookie", "drum", "fire engine", "jeans", "lizard", "rose", "telescope",
    "ant", "canoe", "hot beverage", "snowman without snow", "palm tree", "joystick", "ice cream", "monkey",
    "lollipop", "tulip", "shrimp", "bed", "rabbit face", "red apple", "cheese wedge",
)  # fmt: skip
CONCEPTS = {
    "test": _TEST,
    "fresh": _TEST[10:20],
    "sweep": (
        "anchor", "Christmas tree", "shark", "watermelon", "egg", "hot springs",
        "party popper", "rocket", "cat face", "rice cracker",
    ),
}  # fmt: skip
"""`fresh`: no setting was chosen in sight of these; of `test`'s first ten, four of `null-space`'s were (CHOSEN)."""
ORDERS, SEEDS = (0, 1), (0, 1, 2)
SWEPT_CONCEPTS = 6
SWEPT_RATE = "factor_rate=2e-3"  # where nothing else is swept
_RATES = (
    "factor_rate=5e-4", "factor_rate=1e-3", "factor_rate=2e-3", "factor_rate=4e-3",
    "factor_rate=2.5e-4", "factor_rate=5e-4 token_rate=5e-3", "factor_rate=1.25e-4",
    *(f"factor_rate={rate} token_rate={token}" for rate in ("2.5e-4", "1.25e-4") for token in ("2e-2", "4e-2")),
    "factor_rate=6.25e-5",
)  # fmt: skip
SWEPT = {
    "none": _RATES,
    "fold": _RATES,
    "ewc": (
        "ewc_lambda=1e2", "ewc_lambda=1e3", "ewc_lambda=1e4", "ewc_lambda=1e5", "ewc_lambda=1e6", "ewc_lambda=1e7",
        "ewc_lambda=1e6 factor_rate=1e-3", "ewc_lambda=3e6", "ewc_lambda=3e5", "ewc_lambda=1e6 factor_rate=4e-3",
        "ewc_lambda=1e7 factor_rate=4e-3", "ewc_lambda=1e5 factor_rate=1e-3",
    ),
    "ewc-dc": (
        "dc_lambda=1e2", "dc_lambda=1e3", "dc_lambda=1e4", "dc_lambda=1e5", "dc_lambda=10", "dc_lambda=1",
        "dc_lambda=10 factor_rate=1e-3", "dc_lambda=3", "dc_lambda=30", "dc_lambda=10 factor_rate=4e-3",
        "dc_lambda=1e2 factor_rate=4e-3", "dc_lambda=1 factor_rate=1e-3",
    ),
    "dsc": (
        *(f"dsc_scores={scores} dsc_eps={eps}" for eps in (1.0, 10.0) for scores in (0.01, 0.1)),
        "dsc_scores=0.01 dsc_eps=100", "dsc_scores=0.01 dsc_eps=10 factor_rate=5e-4",
        "dsc_scores=0.1 dsc_eps=10 factor_rate=5e-4", "dsc_scores=0.01 dsc_eps=100 factor_rate=5e-4",
        "dsc_scores=0.01 dsc_eps=10 factor_rate=2.5e-4", "dsc_scores=0.01 dsc_eps=10 factor_rate=1e-3",
        "dsc_scores=0.01 dsc_eps=1 factor_rate=5e-4", "dsc_scores=0.01 dsc_eps=10 factor_rate=5e-4 dsc_rate=2e-3",
    ),
    "dsc+ewc-dc": (
        *(f"dc_lambda={weight} dsc_scores={scores}" for scores in (0.01, 0.1) for weight in (1e3, 1e4)),
        "dc_lambda=1e2 dsc_scores=0.1", "dc_lambda=10 dsc_scores=0.1", "dc_lambda=10 dsc_scores=0.1 factor_rate=1e-3",
        "dc_lambda=1 dsc_scores=0.1", "dc_lambda=10 dsc_scores=0.01", "dc_lambda=1 dsc_scores=0.1 factor_rate=1e-3",
        "dc_lambda=10 dsc_scores=0.1 dsc_eps=10 factor_rate=1e-3", "dc_lambda=10 dsc_scores=0.1 factor_rate=4e-3",
    ),
    "c-lora": (
        "c_lora_lambda=10", "c_lora_lambda=1e2", "c_lora_lambda=1e3", "c_lora_lambda=1e4",
        "c_lora_lambda=1", "c_lora_lambda=10 factor_rate=1e-3", "c_lora_lambda=30", "c_lora_lambda=300",
        "c_lora_lambda=1e2 factor_rate=1e-3", "c_lora_lambda=1e2 factor_rate=4e-3", "c_lora_lambda=1e3 factor_rate=4e-3",
        "c_lora_lambda=10 factor_rate=4e-3",
    ),
    "null-space": (
        "null_energy=1e-4", "null_energy=1e-3", "null_energy=1e-2", "null_energy=5e-2",
        "null_energy=1e-2 factor_rate=1e-3", "null_energy=1e-2 factor_rate=5e-4", "null_energy=5e-2 factor_rate=1e-3",
        "null_energy=5e-2 factor_rate=5e-4", "null_energy=0.1", "null_energy=0.1 factor_rate=1e-3",
        "null_energy=2e-2 factor_rate=1e-3", "null_energy=0.2 factor_rate=1e-3",
    ),
    "token": tuple(f"factor_rate=0 token_rate={rate}" for rate in (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)),
    "alone": _RATES[:4],
    "joint": _RATES[:4],
}  # fmt: skip
"""What is tried of each method on the sweep concepts: twelve trials, the second six where the first pointed; of the words alone
and of the upper bounds four to six. `null-space` was tried while its code changed, too (LOG.md)."""

CHOSEN = {
    "none": "factor_rate=2.5e-4",
    "fold": "factor_rate=1.25e-4",
    "ewc": "ewc_lambda=1e6 factor_rate=2e-3",
    "ewc-dc": "dc_lambda=10 factor_rate=4e-3",
    "dsc": "dsc_scores=0.01 dsc_eps=10 factor_rate=5e-4 dsc_rate=2e-3",
    "dsc+ewc-dc": "dc_lambda=10 dsc_scores=0.1 factor_rate=4e-3",
    "c-lora": "c_lora_lambda=300 factor_rate=2e-3",
    "null-space": "",
    "token": "factor_rate=0 token_rate=4e-2",
    "alone": "factor_rate=2e-3",
    "joint": "factor_rate=4e-3",
}
"""Of those, what has the largest sum of alignment, share recognised and diffusion-classifier accuracy at the end; of `none` what
seven trials chose (LOG.md); of `null-space` the default, whose rate, wordings, nouns and energy were chosen in sight of runs on
the test concepts, too."""
BESIDE = {
    "fold": "factor_rate=5e-4",
    "ewc-dc": "dc_lambda=10 factor_rate=2e-3",
    "dsc": "dsc_scores=0.01 dsc_eps=10 factor_rate=5e-4",
    "dsc+ewc-dc": "dc_lambda=10 dsc_scores=0.1 factor_rate=2e-3",
    "c-lora": "c_lora_lambda=1e2 factor_rate=2e-3",
    "null-space": "null_energy=1e-2 factor_rate=2e-3",
}
"""What the first six trials chose, where all choose otherwise; of `null-space` the rate and energy that its sweep alone chooses."""

SAME = {
    "b37e4343efc1": frozenset({*METHODS, *BOUNDS} - {"null-space"}),
    "88aa8a4af80f": frozenset({*METHODS, *BOUNDS}),  # a variable's type
    "6ebf964e6a53": frozenset({*METHODS, *BOUNDS}),  # "none of these", no answer there; sums in another order
    "792a44c374a2": frozenset({*METHODS, *BOUNDS}),  # judged by region, but not there
    "431233e17b84": frozenset({*METHODS, *BOUNDS}),  # few of many labels, but not by the whole picture
    "141a233a9a4e": frozenset({*METHODS, *BOUNDS}),  # draws in another order, but not by the whole picture
    "60008b9d148c": frozenset({*METHODS, *BOUNDS}),  # a number more in the manifest, damaged runs told
    "eeee26cd097f": frozenset({*METHODS, *BOUNDS}),  # gradients checked, states of the Fisher's prompts computed once
    "6809ad94816a": frozenset({*METHODS, *BOUNDS}),  # drawings judged without pictures; few large rows at once
    "861a44f96443": frozenset({*METHODS, *BOUNDS}),  # a run ends at one sudden loss; where settings come from
    "75610fce9e12": frozenset({*METHODS, *BOUNDS}),  # how large such a loss is
}
"""By the sources that lines were made with, the methods that have learned the same since, bit for bit: what
`tools/same_bits.py` finds, and found by hand before there was one (LOG.md)."""
SAME_AS = "a800b1762acd"
"""The sources up to which SAME speaks: whoever changes them finds out which methods still learn the same, and says so here."""


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
        return ordered(CONCEPTS[self.split][: self.concepts], self.order)

    def key(self, base: BaseModel) -> dict[str, Any]:
        given = {k: v for k, v in self.settings.dump().items() if v != Settings().dump()[k] or k == "steps"}
        return {
            "benchmark": "forgetting", "method": self.method, "order": self.order, "seed": self.seed, "concepts": self.concepts,
            "split": self.split, "settings": given, "base": base.spec.entry.fingerprint.weights[:12], "sources": sources(),
        }  # fmt: skip


def ordered(names: Sequence[str], order: int) -> list[str]:
    return [names[i] for i in np.random.default_rng(order).permutation(len(names))] if order else list(names)


def sources(patterns: Sequence[str] = SOURCES) -> str:
    """A hash of the code that a result depends on."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in patterns for p in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def settings_of(method: str, seed: int, given: Sequence[str]) -> Settings:
    trained = "none" if method in BOUNDS else method
    values = {k: json.loads(v) for k, v in (s.split("=") for s in given)}
    return Settings.of({**values, "method": trained, "seed": seed})


def chosen(method: str, seed: int, given: Sequence[str] = ()) -> Settings:
    """A method's chosen settings, and over them the `given` ones."""
    return settings_of(method, seed, [*CHOSEN[method].split(), *given])


def swept(one: Run) -> list[Run]:
    """Every method at each of its settings on six sweep concepts: all methods' first settings, then their second, and so on."""
    turns = (zip(SWEPT, given, strict=True) for given in zip_longest(*SWEPT.values()))
    return [
        replace(
            one,
            method=method,
            split="sweep",
            concepts=SWEPT_CONCEPTS,
            settings=settings_of(method, 0, [SWEPT_RATE, *given.split()]),
        )
        for turn in turns
        for method, given in turn
        if given is not None
    ]


def whole(one: Run, given: Sequence[str], settings: Mapping[str, str] = CHOSEN) -> list[Run]:
    """Every method and bound in each order under each seed, at its chosen settings, or those in `settings` at these."""
    return [
        replace(one, method=m, order=order, seed=seed, settings=settings_of(m, seed, [*words.split(), *given]))
        for seed in SEEDS
        for order in ORDERS
        for m, words in settings.items()
        if order == 0 or m not in ORDERLESS
    ]


def in_every_order(line: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """A run as each order sees it, where it knows none: another concept is the last one; `names` are those of order 0."""
    if line["method"] not in ORDERLESS:
        return [line]
    by_concept = line.get("by_concept") or line["alignment_matrix"][-1]
    last = [names.index(ordered(names, order)[-1]) for order in ORDERS]
    return [line | {"order": o, "last_alignment": by_concept[i]} for o, i in zip(ORDERS, last, strict=True)]


def of_the_same_last(lines: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Runs whose last concepts can be compared: what knows no order has the mean over what is last in each, and a method that
    was not run in every order says nothing of it, for one concept is easier than another.
    """
    shown = []
    for line in lines:
        orders = {x["order"] for x in lines if x["method"] == line["method"]}
        if line["method"] in ORDERLESS:
            last = [each["last_alignment"] for each in in_every_order(line, names)]
            shown.append(line | {"last_alignment": float(np.mean(last))})
        else:
            shown.append({k: v for k, v in line.items() if k != "last_alignment" or orders == set(ORDERS)})
    return shown
