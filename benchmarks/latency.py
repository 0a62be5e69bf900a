"""Whole pictures: our engines against diffusers' own pipeline at the same steps, guidance, sampler and noise.

A picture is a prompt that was not seen before (ours forget it before each round), `steps` UNet calls with guidance as one
batch of two, and the decoder. What limits it on a small base: a call at two rows reads all weights for little arithmetic, so
the time goes into launching a few hundred kernels; OpenVINO with fixed shapes fuses most of them away. At eight pictures
(sixteen rows) it is the matrix products, of which AMX does bfloat16 at many times the float32 rate: see `share_of_peak`,
FLOPs of the UNet's products over time, over what large products and convolutions reach here in the same precision. Where
torch finds a GPU all but OpenVINO run there, and TensorRT joins.

`off` is the mean distance from diffusers' float32 pictures, in steps of 255: how much of the picture the speed has cost.

    python benchmarks/latency.py [--pictures 1 8] [--rounds 9] [--steps 20] [--threads 2] [--without compile]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import cpserve
from benchmarks.timing import interleaved, keep, medians, peak
from cpserve.base import BUILTIN, BaseModel
from cpserve.engine import Engine, open_engine, torch_device
from cpserve.sample import starting_noise
from export.build import plan_export
from export.target import Target

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
WORDS = "a photo of a red apple on a blue background"
Draw = Callable[[], np.ndarray]


def ours(engine: Engine, count: int, asked: argparse.Namespace) -> Draw:
    """Pictures `[B,H,W,3]` in 0..255; their prompt is new each time."""
    drawing = cpserve.Drawing(steps=asked.steps, guidance=asked.guidance)

    def draw() -> np.ndarray:
        engine.bank.clear()
        drawn = cpserve.generate(engine, [cpserve.Prompt(WORDS)] * count, range(count), drawing)
        return np.stack([np.asarray(one.image, dtype=np.float32) for one in drawn])

    return draw


def theirs(pipe: Any, count: int, asked: argparse.Namespace) -> Draw:
    """diffusers' pipeline from the same noise."""
    unet = pipe.unet.config
    noise = starting_noise(range(count), (unet.in_channels, unet.sample_size, unet.sample_size))
    noise = noise.to(pipe.device, pipe.dtype)

    def draw() -> np.ndarray:
        options = {"num_inference_steps": asked.steps, "guidance_scale": asked.guidance, "output_type": "np"}
        return np.round(pipe([WORDS] * count, latents=noise, **options).images * 255.0)

    return draw


def pipelines(base: str, without: list[str]) -> dict[str, Any]:
    """diffusers' public configurations: its defaults, bfloat16, and both compiled."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    where = base if base != BUILTIN else str(Path(cpserve.__file__).parent / "models" / "emoji64")
    plain = StableDiffusionPipeline.from_pretrained(where, safety_checker=None, dtype=torch.float32).to(torch_device())
    plain.scheduler = DPMSolverMultistepScheduler.from_config(plain.scheduler.config)
    plain.set_progress_bar_config(disable=True)
    made = {"diffusers fp32": plain, "diffusers bf16": _copy(plain).to(torch.bfloat16)}
    if "compile" not in without:
        for name in list(made):
            made[f"{name} compiled"] = compiled = _copy(made[name])
            compiled.unet.compile()
            compiled.vae.decoder.compile()
    return made


def _copy(pipe: Any) -> Any:
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    made = type(pipe)(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def engines(base: BaseModel, asked: argparse.Namespace, folder: Path) -> dict[str, Engine]:
    """Ours; bundles are made in `folder` unless they lie there already."""
    targets = {
        "cpserve onnx fp32": Target(),
        "cpserve openvino fp32": Target(runner="openvino", precision="float32"),
        "cpserve openvino bf16": Target(runner="openvino", precision="bfloat16"),
    }
    if torch.cuda.is_available():
        targets["cpserve trt fp16"] = Target(runner="trt", precision="float16")
    made = {"cpserve eager fp32": open_engine(asked.base)}
    if "compile" not in asked.without:
        compiled = open_engine(asked.base, engine="compile")
        made[f"cpserve compile {SHORT[compiled.precision]}"] = compiled
    for name, target in targets.items():
        if not any(word in name for word in asked.without):
            bundle = plan_export(base, folder / name.replace(" ", "-"), target).execute()
            made[name] = open_engine(bundle=bundle.root, threads=asked.threads)
    return made


def flops(base: BaseModel) -> float:
    """Of one row's UNet call."""
    spec = base.spec
    side = spec.latent_size
    bank = torch.zeros(1, spec.tokens, spec.sites.packed_width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        base.unet(torch.zeros(1, spec.channels, side, side), torch.zeros(1), bank, torch.zeros(1, dtype=torch.int64))
    return float(counter.get_total_flops())


def report(draws: dict[str, Draw], asked: argparse.Namespace, row_flops: float, count: int) -> dict[str, Any]:
    """A table for people, and the same as a dictionary."""
    judge = draws["diffusers fp32"]()
    off = {name: round(float(np.abs(draw() - judge).mean()), 3) for name, draw in draws.items()}
    times = medians(interleaved(draws, asked.rounds))
    done = row_flops * asked.steps * count * (1 if asked.guidance == 1 else 2)
    best = {
        short: peak(getattr(torch, name), torch_device())
        for name, short in SHORT.items()
        if any(short in rival for rival in draws)
    }
    default = times["diffusers fp32"]
    fastest = min(t for name, t in times.items() if name.startswith("diffusers"))
    rows = {}
    for name, took in sorted(times.items(), key=lambda item: item[1]):
        share = done / took / best[next(short for short in best if short in name)]
        rows[name] = {"s": took, "off": off[name], "share_of_peak": round(share, 3)}
        print(
            f"{count:3d}  {name:26s} {took * 1000:9.1f} ms  {default / took:5.2f}x defaults  {fastest / took:5.2f}x fastest"
            f"  off {off[name]:.2f}  {100 * share:4.1f} % of peak",
            flush=True,
        )
    return {"rivals": rows, "peak_gflops": {k: round(v / 1e9) for k, v in best.items()}}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--base", default=BUILTIN)
    arguments.add_argument("--pictures", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--guidance", type=float, default=3.0)
    arguments.add_argument("--threads", type=int)
    arguments.add_argument("--without", nargs="*", default=[], help="words of rivals' names to leave out, or: compile")
    arguments.add_argument("--bundles", type=Path, help="keep the bundles in this folder")
    asked = arguments.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    base = cpserve.load_base(asked.base)
    with tempfile.TemporaryDirectory() as temporary:
        running = engines(base, asked, asked.bundles or Path(temporary))
        pipes = pipelines(asked.base, asked.without)
        result = {}
        for count in asked.pictures:
            draws = {name: theirs(pipe, count, asked) for name, pipe in pipes.items()}
            draws |= {name: ours(engine, count, asked) for name, engine in running.items()}
            result[str(count)] = report(draws, asked, flops(base), count)
        for engine in running.values():
            engine.close()
    how = {"base": asked.base, "steps": asked.steps, "guidance": asked.guidance, "rounds": asked.rounds}
    keep("latency", {**how, "pictures": result})


if __name__ == "__main__":
    main()
