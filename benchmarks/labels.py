"""Which learned concept is this? The diffusion classifier as published (`error_tables.Published`) against `classify`.

Physics: the noise in a picture is predicted best under the prompt that explains the picture. One look (t, noise) at one label
is one UNet evaluation, and the difference between two labels' errors is far smaller than either error: how many looks it takes
to see it above the noise is the whole cost. The reference spends a fixed number (at 20 labels 50 x 20 + 450 x 5 = 3250);
`classify` looks where labels differ most, with opposite noise, drops labels as soon as their odds rule them out, and judges
by the regions of the picture that a concept explains.

Data: 20 held-out concepts, six things drawn in two styles among them (near-twins), taught in sequence with the default method
from six pictures each; asked about ten pictures each of the same drawings with turns and clutter that were not taught, and
ten each of 20 held-out concepts never taught. Three seeds, each with its own pictures and training; ours has the draws of its
default seed in all of them, the reference its own for each picture. The reference knows no "none of these": accuracy and cost
compare both among the known labels (`--known-only`), with the reference on torch as the authors ran it, and seconds on the
same engine beside. Calibration and "none of these" are measured with the defaults; the threshold at 5 % false alarms is
fitted on further pictures of the known concepts. Seconds of a picture alone are medians of rivals taking turns. The levers
are judged from one table of errors. Beside ours: Lite0's nearest class mean.

Everything learned and measured is kept in `--work` by what it depends on (base, settings, seed, labels, code that judges): a
killed run goes on where it was, and two terminals share the work (each is then slower, which its seconds in bulk show). What
the reference says is kept in `results/published.jsonl`, too. Each seed is one line in `results/labels.jsonl`, and one in
`results/seconds.jsonl` with the seconds of a picture alone, which are the processor's and the engine's: those of the last count.
What levers bring and what more labels cost is measured on the first seed, or those asked for with `--only`, a line each in
`results/levers.jsonl` and `results/scaling.jsonl`, of which the last counts. A line that stands is not run again.

    python tools/emoji64/sources.py && python tools/emoji64/render.py     # the drawings, once
    python benchmarks/labels.py [--engine openvino] # hours; most of them the reference's
    python benchmarks/labels.py --quick             # a few small concepts through every part; lines are kept in --work
    python benchmarks/labels.py --only taught       # or: reference, levers, ...; parts of the work, to spread over time
    python benchmarks/labels.py --table             # tables from the committed lines; also --precision bfloat16
    python benchmarks/labels.py --plot docs/recognising.png   # the same lines as curves
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "emoji64"))

import cpserve
from benchmarks.label_parts import (
    code,
    on,
    part_encoder,
    part_levers,
    part_none,
    part_ours,
    part_reference,
    part_scaling,
    part_taught,
    part_timing,
)
from benchmarks.label_plot import plot
from benchmarks.label_table import average, table, together
from benchmarks.label_work import QUICK, ROOT, Asked, Work
from benchmarks.timing import RESULTS, keep, kept_lines

NAME, SECONDS = "labels", "seconds"
KEYS = (
    "base", "weights", "code", "engine", "precision", "method", "steps", "settings", "judging", "concepts", "pictures",
)  # fmt: skip


def key(work: Work) -> dict[str, Any]:
    """What a line depends on."""
    asked, settings = work.asked, work.settings(work.asked.seeds[0])
    return {
        "base": asked.base, "weights": work.base.spec.entry.fingerprint.weights[:12], "code": code(), "seeds": list(asked.seeds),
        "engine": asked.engine, "precision": asked.precision, "method": settings.method, "steps": settings.steps,
        "settings": asked.settings, "judging": asdict(work.judging), "concepts": asked.concepts,
        "near_twins": int(asked.twins.sum()), "pictures": len(asked.truth),
    }  # fmt: skip


def hashes(work: Work) -> list[str]:
    return [adapter.content_hash[:12] for adapter in work.adapters.values()]


def result(work: Work) -> dict[str, Any]:
    """Everything that a seed's line says beside."""
    (reference, theirs), (mine, labels) = part_reference(work), part_ours(work)
    return {
        "adapters": hashes(work), "reference": reference, "ours": mine,
        "labels": {"truth": work.asked.truth.tolist(), "reference": theirs.tolist(), "ours": labels.tolist()},
        "none": part_none(work), "encoder": part_encoder(work),
    }  # fmt: skip


LINES: dict[str, Callable[[Work], dict[str, Any]]] = {
    NAME: result,
    SECONDS: lambda work: {**on(), "adapters": hashes(work), "seconds_alone": part_timing(work)},
    "levers": lambda work: {"levers": part_levers(work)},
    "scaling": lambda work: {"scaling": part_scaling(work)},
}


def add(work: Work, name: str) -> None:
    """The line `name`, unless it stands, from another process perhaps."""
    wanted = key(work) | (on() if name == SECONDS else {})

    def stands() -> bool:
        return any(line.items() >= wanted.items() for line in kept_lines(name, work.results))

    if not stands():
        made = wanted | LINES[name](work)
        if not stands():
            keep(name, made, work.results)


def found(results: Path, precision: str = Asked.precision) -> dict[str, Any]:
    """As one, the lines that differ from the last seed's in this precision in nothing but the seed; seconds are those of the last
    line's processor and engines.
    """
    last = [line for line in kept_lines(NAME, results) if line["precision"] == precision][-1]
    same = {name: [x for x in kept_lines(name, results) if all(x[k] == last[k] for k in KEYS)] for name in LINES}
    if not same[SECONDS]:
        sys.exit("no line of seconds goes with the last one of labels: run it with --only seconds")
    seconds = [x for x in same[SECONDS] if all(x[k] == same[SECONDS][-1][k] for k in on())]
    timed = {"processor": seconds[-1]["processor"], "seeds": len(seconds)}
    extras = {name: same[name][-1][name] for name in ("levers", "scaling") if same[name]}
    return together(same[NAME], average([x["seconds_alone"] for x in seconds])) | extras | {"timed": timed}


PARTS: dict[str, Callable[[Work], Any]] = {
    "taught": part_taught, "timing": part_timing, "reference": part_reference, "ours": part_ours, "none": part_none,
    "encoder": part_encoder,
}  # fmt: skip


def asked_of(given: argparse.Namespace) -> Asked:
    settings = {k: json.loads(v) if v[0].isdigit() else v for k, v in (s.split("=") for s in given.set)}
    quick = QUICK if given.quick else Asked()
    values = {k: v for k, v in vars(given).items() if k in Asked.__dataclass_fields__ and v is not None}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return replace(quick, **values, settings=quick.settings | settings)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--base")
    arguments.add_argument("--engine", choices=("eager", "onnx", "openvino"))
    arguments.add_argument("--precision", choices=("float32", "bfloat16"), help="of the engine")
    arguments.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the trainer, such as steps=300"
    )
    arguments.add_argument("--concepts", type=int)
    arguments.add_argument("--seeds", type=int, nargs="+")
    arguments.add_argument("--labels", type=int, nargs="+", help="numbers of labels to measure the cost at")
    arguments.add_argument("--label-steps", type=int, help="optimiser steps a concept for these")
    arguments.add_argument("--work", type=Path, default=ROOT / "build" / "labels")
    arguments.add_argument("--only", choices=(*PARTS, *LINES), help="print one part, or keep one line")
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--table", action="store_true")
    arguments.add_argument("--plot", type=Path, metavar="FILE")
    given = arguments.parse_args()
    if given.table or given.plot:
        if given.table:
            print(table(found(RESULTS, given.precision or Asked.precision)))
        if given.plot:
            plot(found(RESULTS), given.plot)
        return
    asked, base = asked_of(given), cpserve.load_base(given.base or Asked.base)
    results = given.work if given.quick else RESULTS
    for seed in asked.seeds:
        with closing(Work(given.work, replace(asked, seeds=(seed,)), base, results)) as work:
            if given.only:
                if given.only in PARTS:
                    print(PARTS[given.only](work))
                else:
                    add(work, given.only)
                continue
            for name in LINES if seed == Asked.seeds[0] else (NAME, SECONDS):
                add(work, name)
    if not given.only:
        print(table(found(results, asked.precision)))


if __name__ == "__main__":
    main()
