"""Optimum's pipelines, driven by `benchmarks/optimum.py`; runs in an environment of its own and knows nothing of cpserve.

    python optimum_draw.py intel|onnx MODEL COUNT STEPS GUIDANCE FIXED

Prints the versions of what it runs on, then for each line on standard input draws COUNT pictures of MODEL, a diffusers folder,
and prints the seconds that took. FIXED 1: OpenVINO's shapes are fixed, as Optimum's own guide recommends.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler

PACKAGES = {"intel": ("optimum-intel", "openvino"), "onnx": ("optimum-onnx", "onnxruntime")}


def opened(kind: str, model: str, count: int, *, fixed: bool) -> Any:
    if kind == "onnx":
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        return ORTStableDiffusionPipeline.from_pretrained(model, export=True, safety_checker=None)
    from optimum.intel import OVStableDiffusionPipeline

    pipe = OVStableDiffusionPipeline.from_pretrained(model, export=True, compile=False, safety_checker=None)
    if fixed:
        side = pipe.unet.config["sample_size"] * pipe.vae_scale_factor
        pipe.reshape(batch_size=count, height=side, width=side, num_images_per_prompt=1)
    pipe.compile()
    return pipe


def main() -> None:
    kind, model, count, steps, guidance, fixed = sys.argv[1:]
    number = int(count)
    pipe = opened(kind, model, number, fixed=fixed == "1")
    size = pipe.unet.config["sample_size"]
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": int(steps), "guidance_scale": float(guidance), "output_type": "np"}
    names = (*PACKAGES[kind], "optimum", "diffusers", "torch")
    print(json.dumps({name: version(name) for name in names}), flush=True)
    for prompt in sys.stdin:
        noise = torch.randn(number, 4, size, size)
        began = time.perf_counter()
        pipe([prompt.strip()] * number, latents=noise, **options)
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
