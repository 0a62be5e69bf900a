"""Stable Diffusion 1.5 at full width on a CPU: one step at two rows (a picture with guidance), 64x64 latents, and its memory.

The weights are random: none are fetched, and time and memory do not depend on them. Each rival runs in a process of its own,
so that its peak memory is its own and all need not fit at once; in turns, in an order that changes every round. `off` is the
largest difference from diffusers' float32 output, over the largest number in that. Bundles are made first; with TensorRT-RTX
installed its plan, too, which no CPU can run: its build time and size are kept.

    python benchmarks/wide.py [--rounds 2] [--steps 3] [--folder DIR]      # 20 GB of disk; DIR is kept and used again
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cpserve
from benchmarks.timing import keep, seconds
from cpserve.engine import Engine, open_engine
from cpserve.prompts import Prompt
from export.build import plan_export
from export.target import Target
from tests.tiny import FULL_SD15, write_pipeline

BASE, ROWS = "base", 2
BUNDLES = {
    "onnx fp32": Target(),
    "openvino fp32": Target(runner="openvino", precision="float32"),
    "openvino bf16": Target(runner="openvino", precision="bfloat16"),
}
PLAN = Target(runner="trt", precision="float32", rows=(ROWS,), gpus=("sm86",))
DIFFUSERS = {"diffusers fp32": torch.float32, "diffusers bf16": torch.bfloat16}
RIVALS = [*DIFFUSERS, "cpserve eager fp32", *(f"cpserve {name}" for name in BUNDLES)]


def rows() -> tuple[Tensor, Tensor]:
    """Latents and timesteps, the same for all."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 4, 64, 64, generator=draw), torch.tensor([500.0, 500.0])


def ours(engine: Engine, steps: int) -> tuple[list[float], Tensor]:
    """Seconds a step after one that is not counted, and the output."""
    z, t = rows()
    bank, slot = engine.bank.packed([Prompt("a dog"), Prompt("")])
    output = engine.infer(z, t, bank, slot)
    return [seconds(lambda: engine.infer(z, t, bank, slot)) for _ in range(steps)], output


@torch.no_grad()
def theirs(folder: Path, dtype: torch.dtype, steps: int) -> tuple[list[float], Tensor]:
    """The same of diffusers' UNet under the same prompts."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder / BASE, safety_checker=None, dtype=dtype)
    texts = pipe.encode_prompt("a dog", "cpu", 1, do_classifier_free_guidance=True, negative_prompt="")
    z, t = rows()
    e, z = torch.cat(texts[:2]), z.to(dtype)
    output = pipe.unet(z, t, e).sample
    return [seconds(lambda: pipe.unet(z, t, e)) for _ in range(steps)], output.float()


def one(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """A rival, measured in this process; its output is left in `folder`."""
    if name in DIFFUSERS:
        times, output = theirs(folder, DIFFUSERS[name], steps)
    else:
        bundle = folder / name.removeprefix("cpserve ").replace(" ", "-")
        options: dict[str, Any] = {"engine": "eager"} if "eager" in name else {"bundle": bundle}
        with open_engine(str(folder / BASE), **options) as engine:
            times, output = ours(engine, steps)
    torch.save(output, folder / f"{name}.pt")
    return {"s": times, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """Write the base model, a bundle or the plan, where it is not there yet; seconds and bytes."""
    began = time.monotonic()
    out = folder / name.replace(" ", "-")
    if name == BASE and not out.exists():
        write_pipeline(out, FULL_SD15)
    elif name != BASE:
        target = PLAN if name == "trt" else BUNDLES[name]
        plan_export(cpserve.load_base(str(folder / BASE)), out, target).execute(lambda what: print(what, flush=True))
    graph = "unet.plan" if name == "trt" else "unet"
    unet = (path for path in out.rglob("*") if path.relative_to(out).parts[0].startswith(graph))
    size = sum(path.stat().st_size for path in unet if path.is_file())
    return {"s": round(time.monotonic() - began, 1), "mib": size >> 20}


def apart(asked: argparse.Namespace, folder: Path, job: str, name: str) -> dict[str, Any]:
    """A job in a process of its own."""
    words = [sys.executable, __file__, "--folder", str(folder), "--steps", str(asked.steps), f"--{job}", name]
    ran = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ran.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def run(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, in turns."""
    wanted = [BASE, *BUNDLES, *(["trt"] if find_spec("tensorrt_rtx_bindings") else [])]
    made = {}
    for name in wanted:
        made[name] = apart(asked, folder, "prepare", name)
        print(f"{name:16s} {made[name]['s']:7.1f} s, {made[name]['mib']} MiB", flush=True)
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in RIVALS}
    order, shuffle = list(RIVALS), random.Random(0)
    for _ in range(asked.rounds):
        shuffle.shuffle(order)
        for name in order:
            measured[name].append(apart(asked, folder, "one", name))
            print(f"{name:24s} {measured[name][-1]}", flush=True)
    judge = torch.load(folder / "diffusers fp32.pt")
    found = {}
    for name, all_ in measured.items():
        off = float((torch.load(folder / f"{name}.pt") - judge).abs().max() / judge.abs().max())
        took = statistics.median(s for each in all_ for s in each["s"])
        found[name] = {
            "s": round(took, 3),
            "peak_mib": max(each["peak_mib"] for each in all_),
            "off": float(f"{off:.1e}"),
        }
    for name, each in found.items():
        ratio = {rival: found[rival]["s"] / each["s"] for rival in DIFFUSERS}
        print(f"{name:24s} {each}  " + "  ".join(f"{r:.2f}x {rival}" for rival, r in ratio.items()), flush=True)
    return {"rows": ROWS, "latents": 64, "steps": asked.steps, "rounds": asked.rounds, "rivals": found, "made": made}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=3)
    arguments.add_argument("--folder", type=Path)
    arguments.add_argument("--prepare", help=argparse.SUPPRESS)
    arguments.add_argument("--one", help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    if asked.prepare:
        print(json.dumps(prepare(asked.prepare, asked.folder)))
    elif asked.one:
        print(json.dumps(one(asked.one, asked.folder, asked.steps)))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = asked.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            keep("wide", run(asked, folder))


if __name__ == "__main__":
    main()
