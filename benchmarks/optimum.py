"""Whole pictures at one adapter against Optimum's pipelines of the same model, each library in an environment of its own.

Optimum pins older libraries than ours, so every rival is a process that stays open and draws when told to, in turns. An
adapter is folded into a pipeline's weights, or costs the K,V of a prompt in our engine: those are computed anew each time, as
the pipelines read their prompt anew. All take what the machine offers by default, OpenVINO bfloat16 where the CPU has it;
`fixed` is Optimum's OpenVINO pipeline reshaped to one picture, as its guide recommends; reshaped to several it fails.

    python benchmarks/optimum.py [--pictures 1 8] [--rounds 9] [--steps 20]     # see benchmarks/rivals/README.md first
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import cpserve
from benchmarks.latency import WORDS
from benchmarks.swap import adapter
from benchmarks.timing import keep, seconds
from cpserve.engine import open_engine
from export.build import plan_export
from export.target import Target

HERE = Path(__file__).parent
PAUSE_S = (
    0.5  # OpenMP's threads spin for a fifth of a second after their work, and would do so in the next rival's turn
)
ENVIRONMENTS = HERE.parent / "build" / "rivals"
MODEL = Path(cpserve.__file__).parent / "models" / "emoji64"
OURS = {"cpserve onnx": Target(), "cpserve openvino": Target(runner="openvino")}
RIVALS = {  # environment, kind, fixed shapes
    "optimum-onnx": ("optimum-onnx", "onnx", "0"),
    "optimum-intel": ("optimum-intel", "intel", "0"),
    "optimum-intel, fixed": ("optimum-intel", "intel", "1"),
}


def drawing(bundle: Path, count: int, steps: int, guidance: float) -> None:
    """Our side of the protocol of `rivals/optimum_draw.py`."""
    how = cpserve.Drawing(steps=steps, guidance=guidance)
    with open_engine(bundle=bundle) as engine:
        one = adapter(engine.spec, 0)
        print(json.dumps({"precision": engine.precision}), flush=True)
        for words in sys.stdin:
            engine.bank.clear()
            prompts = [cpserve.Prompt(words.strip(), one)] * count
            print(seconds(lambda prompts=prompts: cpserve.generate(engine, prompts, range(count), how)), flush=True)


@contextmanager
def rival(command: list[str]) -> Iterator[tuple[Any, dict[str, str]]]:
    """A process that draws on demand, and what it says of itself."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        yield process, json.loads(process.stdout.readline())  # type: ignore[union-attr]
    finally:
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()


def drawn(process: Any) -> float:
    """Seconds of one draw."""
    process.stdin.write(WORDS + "\n")
    return float(process.stdout.readline())


def compare(commands: dict[str, list[str]], rounds: int, count: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds, and versions, by rival; one round more warms up."""
    with ExitStack() as stack:
        open_ = {name: stack.enter_context(rival(command)) for name, command in commands.items()}
        times: dict[str, list[float]] = {name: [] for name in open_}
        order, shuffle = list(open_), random.Random(0)
        for number in range(rounds + 1):
            shuffle.shuffle(order)
            for name in order:
                time.sleep(PAUSE_S)
                took = drawn(open_[name][0])
                if number:
                    times[name].append(took)
    found = {name: round(statistics.median(all_), 4) for name, all_ in times.items()}
    for name, took in sorted(found.items(), key=lambda item: item[1]):
        print(f"{count:3d}  {name:24s} {1000 * took:9.1f} ms", flush=True)
    return found, {name: said for name, (_, said) in open_.items()}


def run(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rivals whose environments are here, at each number of pictures."""
    how = [str(asked.steps), str(asked.guidance)]
    model = shutil.copytree(MODEL, folder / "model")
    # the two files that older transformers look for
    Tokenizer.from_file(str(model / "tokenizer" / "tokenizer.json")).model.save(str(model / "tokenizer"))
    for name, target in OURS.items():
        plan_export(cpserve.load_base(), folder / name, target).execute()
    here = {name: what for name, what in RIVALS.items() if (ENVIRONMENTS / what[0] / "bin" / "python").exists()}
    print(f"without {', '.join(set(RIVALS) - set(here)) or 'none'}", flush=True)
    pictures, versions = {}, {}
    for count in asked.pictures:
        commands = {name: [sys.executable, __file__, "--draw", str(folder / name), str(count), *how] for name in OURS}
        for name, (environment, kind, fixed) in here.items():
            if fixed == "1" and count > 1:  # its decoder stays fixed at one picture, and fails
                continue
            python = str(ENVIRONMENTS / environment / "bin" / "python")
            commands[name] = [
                python,
                str(HERE / "rivals" / "optimum_draw.py"),
                kind,
                str(model),
                str(count),
                *how,
                fixed,
            ]
        pictures[str(count)], versions = compare(commands, asked.rounds, count)
    return {
        "steps": asked.steps,
        "guidance": asked.guidance,
        "rounds": asked.rounds,
        "s": pictures,
        "versions": versions,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pictures", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--guidance", type=float, default=3.0)
    arguments.add_argument("--draw", nargs=4, help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    if asked.draw:
        bundle, count, steps, guidance = asked.draw
        drawing(Path(bundle), int(count), int(steps), float(guidance))
        return
    with tempfile.TemporaryDirectory() as temporary:
        keep("optimum", run(asked, Path(temporary)))


if __name__ == "__main__":
    main()
