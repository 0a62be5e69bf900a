"""Seconds to learn one concept: ours against diffusers' own DreamBooth-LoRA script, at equal steps, batch, rank and precision.

Each figure is a fresh process, in turns, in an order that changes every round; medians. `startup` is all until the first
step could begin: imports, models and, for the rival, its optimiser. `concept` is what the ratios are of: from there until the
adapter is on disk. For us that is more than the `loop`: all crops encoded, protected directions or Fisher information,
folding, the check that something was learned. The rival's ends when its weights are saved; it then loads a whole pipeline
once more, which is not counted. `loop_cpu` is CPU time, of all threads: where it is far from `loop` times the threads, the
machine was busy with something else, and the other figures are not worth keeping. `peak_mb` is of the whole process.

Physics. Both run the UNet forward on the batch and backward as far as the first layer that learns, so both are bound by its
convolutions and products; at 64x64 pixels these are so small that launching them is a good part of a step. On top of that:

- rival: the autoencoder encodes each batch anew in every step, files are opened and decoded, the text encoder reads one
  prompt a row; factors on q, k, v and out of self- and cross-attention (ours: k and v of cross-attention), each a few small
  kernels forward and back. `rival, text once` is its `--pre_compute_text_embeddings`, which a learned token rules out for us.
- none: the pictures are encoded once before the loop; a step reads at most four prompts and projects them to all layers' K,V
  in one product, and learns a token through the text encoder.
- null-space: K,V of the folded earlier factors too, whose rank grows with each concept, and one product with `I - Q Q^T` a
  step; once a concept, the text states of all protected prompts and a singular value decomposition a layer.
- ewc-dc: a quadratic term over the factors a step; once a concept, `fisher_draws` passes at batch 1 with a gradient each, on
  as many rows as there are labels.
- dsc: `dsc_steps` more steps, each of nine rows a picture, three of them with gradients.

What a method costs grows with what came before, so the timed concept follows `--earlier` others (of one step each: what they
learned does not matter). The rival has no earlier ones.

    python benchmarks/training.py [--steps 300] [--rounds 3] [--earlier 9] [--methods METHOD ...]

For the rival see benchmarks/rivals/README.md first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import cpserve
import trainer.sequence
from benchmarks.forgetting_runs import LEARNING, sources
from benchmarks.rivals.marked import peak_mb
from benchmarks.timing import keep
from cpserve.adapter import empty_adapter
from cpserve.concept import Concept, Picture
from trainer import METHODS, Record, Settings, learn
from trainer.loop import multiplies_bf16

HERE = Path(__file__).parent
SCRIPT = HERE.parent / "build" / "rivals" / "train_dreambooth_lora.py"
SHA256 = "97cf38b184cad2cc39e414f79b3f1a70cec3b97883350a4d2a3aa0e2533d7883"
RIVALS = {"rival": [], "rival, text once": ["--pre_compute_text_embeddings"]}
OURS = tuple(dict.fromkeys(("none", Settings().method, "ewc-dc")))
PICTURES = Settings().batch
"""The rival's batches never mix two passes over the pictures: with fewer, its batches would be smaller than ours."""


def prepare(asked: argparse.Namespace, folder: Path) -> None:
    """The pictures, and for each method the adapter after each of the earlier concepts."""
    from benchmarks.teach import pictures  # its judge is slow to import, and only drawings are wanted of it

    (folder / "pictures").mkdir()
    for i, image in enumerate([part for parts in pictures("crab", 0) for part in parts][:PICTURES]):
        image.save(folder / "pictures" / f"{i}.png")
    base = cpserve.load_base()
    for method in asked.methods:
        settings = Settings(method=method, steps=1, variants=1, fisher_draws=1, dsc_steps=1, dsc_batch=1)
        adapters = [empty_adapter(base.spec.entry)]
        for number in range(asked.earlier):
            new, record = concept(folder, f"earlier{number}"), Record(folder / "record")
            adapters.append(learn(base, new, adapters[-1], settings, record, past=adapters[1:]))
            record.delete()
        torch.save(adapters, folder / f"{method}.pt")


def concept(folder: Path, name: str) -> Concept:
    """The pictures under a name."""
    files = sorted((folder / "pictures").iterdir())
    return Concept(name, tuple(Picture(file.name, Image.open(file).convert("RGB")) for file in files))


def learn_once(method: str, steps: int, folder: Path) -> dict[str, float]:
    """Ours in this process: when what ended."""
    base = cpserve.load_base()
    start, *past = torch.load(folder / f"{method}.pt", weights_only=False)
    loop, optimise = [], trainer.sequence.optimise

    def timed(*arguments: Any) -> None:
        loop.append((time.time(), time.process_time()))
        optimise(*arguments)
        loop.append((time.time(), time.process_time()))

    trainer.sequence.optimise = timed
    marks, record = {"ready": time.time()}, Record(folder / "record")
    settings, new = replace(Settings(), method=method, steps=steps), concept(folder, "newest")
    adapter = learn(base, new, [start, *past][-1], settings, record, past=past)
    for name, content in adapter.files().items():
        path = folder / "adapter" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    marks["done"] = time.time()
    record.delete()
    (looped, before), *_, (trained, after) = loop
    marks["peak_mb"] = peak_mb()
    return marks | {"looped": looped, "trained": trained, "cpu_before": before, "cpu_after": after}


def once(row: str, asked: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One row in a process of its own, in seconds."""
    out = folder / "rival"
    command = [sys.executable, __file__, "--child", row, "--work", str(folder), "--steps", str(asked.steps)]
    if row in RIVALS:
        options = {
            "pretrained_model_name_or_path": Path(cpserve.__file__).parent / "models" / "emoji64",
            "instance_data_dir": folder / "pictures",
            "instance_prompt": "a photo of sks",
            "output_dir": out,
            "resolution": 64,
            "train_batch_size": Settings().batch,
            "max_train_steps": asked.steps,
            "checkpointing_steps": asked.steps + 1,
            "rank": Settings().rank,
            "mixed_precision": "bf16" if multiplies_bf16() else "no",
            "seed": 0,
        }
        command = [sys.executable, str(HERE / "rivals" / "marked.py"), str(asked.rival_packages), str(asked.rival)]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))] + RIVALS[row]
    began = time.time()
    ran = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{row} failed:\n{ran.stderr[-3000:]}")
    marks = json.loads(ran.stdout.splitlines()[-1])
    if row in RIVALS:
        marks |= {"looped": marks["ready"], "done": (out / "pytorch_lora_weights.safetensors").stat().st_mtime}
    spent = {"startup": marks["ready"] - began, "concept": marks["done"] - marks["ready"]}
    loop = {"loop": marks["trained"] - marks["looped"], "loop_cpu": marks["cpu_after"] - marks["cpu_before"]}
    return spent | loop | {"peak_mb": marks["peak_mb"]}


def summary(spent: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians of each row, and its ratios to the rivals and to `none`."""
    rows = {}
    for name, rounds in spent.items():
        rows[name] = {part: statistics.median(each[part] for each in rounds) for part in rounds[0]}
    for row in rows.values():
        row |= {f"to {name}": row["concept"] / rows[name]["concept"] for name in (*RIVALS, "none") if name in rows}
    return {name: {part: round(value, 3) for part, value in row.items()} for name, row in rows.items()}


def check_rival(script: Path) -> None:
    if not script.exists():
        raise SystemExit(
            f"{script} is missing: benchmarks/rivals/README.md says what to put there, or: --without-rival"
        )
    if hashlib.sha256(script.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{script} is not the file that benchmarks/rivals/README.md names")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=Settings().steps)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--earlier", type=int, default=9, help="concepts learned before the timed one")
    arguments.add_argument("--rival", type=Path, default=SCRIPT, help="the script")
    arguments.add_argument("--rival-packages", type=Path, default=SCRIPT.parent / "lib", help="packages for it alone")
    arguments.add_argument("--without-rival", action="store_true")
    arguments.add_argument("--methods", nargs="+", choices=METHODS, default=OURS)
    arguments.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    arguments.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    if asked.child:
        print(json.dumps(learn_once(asked.child, asked.steps, asked.work)))
        return
    if not asked.without_rival:
        check_rival(asked.rival)
    rows = [*(() if asked.without_rival else RIVALS), *asked.methods]
    spent: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    shuffle, order = random.Random(0), list(rows)
    with tempfile.TemporaryDirectory() as work:
        prepare(asked, Path(work))
        for number in range(asked.rounds):
            shuffle.shuffle(order)
            for row in order:
                spent[row].append(once(row, asked, Path(work)))
                print(number, row, {part: round(value, 2) for part, value in spent[row][-1].items()}, flush=True)
    result = summary(spent)
    for name, row in result.items():
        print(f"{name:18s}" + "".join(f"  {part} {value:g}" for part, value in row.items()))
    used = Settings()
    how = {
        "steps": asked.steps, "rounds": asked.rounds, "earlier": asked.earlier, "batch": used.batch, "rank": used.rank,
        "precision": "bf16" if multiplies_bf16() else "fp32", "pictures": PICTURES, "rival": SHA256[:12],
        "sources": sources(LEARNING),
        "packages": {name: version(name) for name in ("accelerate", "peft", "transformers")},
    }  # fmt: skip
    keep("training", {**how, "rows": result})


if __name__ == "__main__":
    main()
