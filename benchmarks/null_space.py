"""What does the null space protect, and for how many concepts does its room last? From text alone, after a lesson of many.

Test concepts are taught one after another by the default method. Then, of the prompts' text states e and a basis Q of those
that were protected:

- room: how many of all directions Q has after so many concepts, and how much of a new concept's own states lies outside it: an
  update can act on no more than that. One basis serves all layers, for all of them read the same e.
- leak: the share of a state's square that lies outside Q, by kind of prompt, protected or not, and what the last concept did
  to K and V of these: the mean over positions and the largest, relative.
- the same leak for as many directions of rows that are not normalised, where long states outweigh short ones.

    python benchmarks/null_space.py [--concepts 25]      # one line in results/null_space.jsonl, and tables
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cpserve
from benchmarks.forgetting import teach
from benchmarks.forgetting_runs import CONCEPTS, Run, chosen
from benchmarks.markdown import markdown
from benchmarks.teach import pictures
from benchmarks.timing import keep
from cpserve.adapter import Adapter
from cpserve.base import BaseModel
from cpserve.evaluation import EVALUATED
from cpserve.prompts import tokenize
from trainer.penalties.null_space import basis_of
from trainer.sequence import PROMPTS, _ordinary_texts, _protected_texts
from trainer.settings import NOUNS, PROTECTED, UNSEEN, Settings

ENERGIES = (0.01, 0.05, 0.1, 0.2)
LONG = (
    "a photo of {} in the middle of a wide green field full of flowers under a blue sky with white clouds, next to a small "
    "wooden house with a red roof and a long white fence, a river and some tall trees far behind it, on a warm summer evening"
)


@dataclass(frozen=True, eq=False)
class Text:
    """The base's text states under an adapter's tokens."""

    base: BaseModel
    adapter: Adapter

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> Tensor:
        """`[P,S,d]`, with the pooled text where the base has one."""
        ids = tokenize(self.base.spec.tokenizer, texts, self.adapter.tokens)
        extra = self.adapter.extra_rows(self.base.spec.sites.weight.shape[1])
        return torch.cat([self.base.encode_text(part, extra).float() for part in ids.split(PROMPTS)])

    def rows(self, texts: Sequence[str]) -> Tensor:
        """`[P,S,d]`, what K and V are made of."""
        return self.base.spec.sites.split(self.states(texts))[0]


def leak(rows: Tensor, basis: Tensor) -> Tensor:
    """`[P,S]`: the share of each state's square outside the basis `[d,q]`."""
    unit = torch.nn.functional.normalize(rows, dim=-1)
    return 1 - (unit @ basis).pow(2).sum(-1)


def principal(rows: Tensor, count: int) -> Tensor:
    """The `count` first directions `[d,count]` of rows as they are."""
    flat = rows.flatten(0, -2).double()
    return torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)[:, :count].float()


def kinds(tokens: Sequence[str]) -> dict[str, list[str]]:
    """Prompts by kind; the last of the tokens is the newest."""
    *earlier, newest = tokens
    every = {"protected": PROTECTED, "unseen wordings": UNSEEN, "the evaluation's": EVALUATED, "long": (LONG,)}
    return {
        **{kind: [w.format(t) for t in earlier for w in wordings] for kind, wordings in every.items()},
        "two earlier ones": [f"a photo of {a} and {b}" for a, b in pairwise(earlier)],
        "an earlier one and the newest": [f"a photo of {t} and {newest}" for t in earlier],
        "ordinary, protected": _ordinary_texts(NOUNS, PROTECTED),
    }


def room(text: Text, tokens: Sequence[str], ordinary: Tensor) -> list[dict[str, Any]]:
    """After each concept the basis's size, by energy and without ordinary things; and of its own states what lay outside before."""
    energy, every = Settings().null_energy, {t: text.rows([w.format(t) for w in PROTECTED]) for t in tokens}
    empty, found = text.rows([""]), []
    for n, token in enumerate(tokens):
        known = torch.cat([empty, *(every[t] for t in tokens[: n + 1])])
        sizes = {str(e): basis_of(torch.cat([known, ordinary]), e).shape[1] for e in ENERGIES}
        line = {"concepts": n + 1, "directions": sizes, "without ordinary": basis_of(known, energy).shape[1]}
        before = basis_of(torch.cat([empty, *(every[t] for t in tokens[:n]), ordinary]), energy)
        found.append(line | {"own outside": round(float(leak(every[token], before).mean()), 4)})
    return found


def leaks(text: Text, before: Adapter, tokens: Sequence[str], ordinary: Tensor) -> dict[str, dict[str, float]]:
    """By kind of prompt, mean and largest: outside the basis, outside that of raw rows, and the change of K,V by the newest."""
    protected = torch.cat([text.rows(_protected_texts(tokens[:-1])), ordinary])
    basis = basis_of(protected, Settings().null_energy)
    raw, sites, found = principal(protected, basis.shape[1]), text.base.spec.sites, {}
    for kind, texts in kinds(tokens).items():
        e = text.states(texts)
        rows, old = sites.split(e)[0], sites.project(e, before.lora)
        moved = (sites.project(e, text.adapter.lora) - old).norm(dim=-1) / old.norm(dim=-1)
        each = {"outside": leak(rows, basis), "outside, raw rows": leak(rows, raw), "K,V moved": moved}
        found[kind] = {
            f"{name}, {how}": round(float(value), 4)
            for name, values in each.items()
            for how, value in (("mean", values.mean()), ("largest", values.max()))
        }
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--concepts", type=int, default=25)
    arguments.add_argument("--steps", type=int, default=Settings().steps)
    asked = arguments.parse_args()
    if asked.concepts < 3:
        arguments.error("two earlier concepts and a newest one: --concepts 3 or more")
    base, method = cpserve.load_base(), Settings().method
    run = Run(
        method=method, order=0, seed=0, concepts=asked.concepts, split="test",
        settings=chosen(method, 0, [f"steps={asked.steps}"]),
    )  # fmt: skip
    taught = [pictures(name, CONCEPTS["test"].index(name))[0] for name in run.names]
    with tempfile.TemporaryDirectory() as folder:
        adapters = teach(base, run, taught, Path(folder))[0]
    text, tokens = Text(base, adapters[-1]), adapters[-1].tokens
    ordinary = text.rows(_ordinary_texts(NOUNS, PROTECTED))
    line = {"d": ordinary.shape[-1], "room": room(text, tokens, ordinary)}
    line["prompts"] = leaks(text, adapters[-2], tokens, ordinary)
    keep("null_space", run.key(base) | {"benchmark": "null_space"} | line)
    print(shown(line))


def shown(line: dict[str, Any]) -> str:
    """The line as two tables."""
    head = ["concepts", *(f"directions at {e}" for e in ENERGIES), "without ordinary", "own outside"]
    body = [[r["concepts"], *r["directions"].values(), r["without ordinary"], r["own outside"]] for r in line["room"]]
    columns = list(next(iter(line["prompts"].values())))
    prompts = [[kind, *values.values()] for kind, values in line["prompts"].items()]
    return f"{markdown(head, body)}\n\n{markdown(['prompts', *columns], prompts)}"


if __name__ == "__main__":
    main()
