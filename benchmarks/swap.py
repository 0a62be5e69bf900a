"""Many adapters of one base: what mixing them in a batch costs, what a swap costs, and how throughput falls with their number.

Adapters touch only the keys and values of the cross-attention, so that the UNet's work is the same whatever rows hold. What
an adapter costs is its prompt's K,V: one pass of the text encoder and a product, once, then a copy into a slot. Rivals have
one set of weights at a time: rows under other adapters are calls of their own, after an activation (`set_adapters`), a load
into the same modules (`hotswap`), or in as many copies of the UNet as there are adapters (`merged copies`).

    python benchmarks/swap.py [--rows 8] [--rounds 9] [--steps 4] [--swaps 1000] [--sets 1 10 100 1000] [--threads 2]
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import cpserve
from benchmarks.latency import pipelines
from benchmarks.timing import interleaved, keep, medians, seconds
from cpserve.adapter import Adapter
from cpserve.bank import SlotBank
from cpserve.base import BUILTIN, BaseSpec
from cpserve.drawing import Drawing, draw_latents
from cpserve.engines.compiled import CompiledEngine
from cpserve.engines.openvino import OpenvinoEngine
from cpserve.manifest import WEIGHTS, Manifest
from cpserve.prompts import Prompt
from cpserve.sample import begin, dpm_course, starting_noise, step
from export.build import plan_export
from export.target import Target

TEXT = "a photo of a red apple"
RANK = 16


def adapter(spec: BaseSpec, seed: int) -> Adapter:
    """Random factors on every K,V projection."""
    draw = torch.Generator().manual_seed(seed)
    lora = {}
    for site, projection, _ in spec.sites.parts:
        lora[site.key(projection, "A")] = torch.randn(RANK, spec.sites.weight.shape[1], generator=draw) / RANK
        lora[site.key(projection, "B")] = 0.05 * torch.randn(site.width, RANK, generator=draw)
    return Adapter(Manifest(base=spec.entry, concepts=(), method="random"), lora, {})


def mixed(engine: CompiledEngine, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rows under as many adapters against rows under one, warm and cold, and the rivals' ways."""
    many = [adapter(engine.spec, i) for i in range(asked.rows)]
    drawing = Drawing(steps=asked.steps, guidance=3.0)

    def ours(adapters: list[Adapter], *, cold: bool = False) -> Callable[[], object]:
        def draw() -> object:
            if cold:
                engine.bank.clear()
            return draw_latents(engine, [Prompt(TEXT, a) for a in adapters], range(asked.rows), drawing)

        return draw

    rivals: dict[str, Callable[[], object]] = {
        "one adapter": ours(many[:1] * asked.rows),
        "mixed": ours(many),
        "mixed, K,V cold": ours(many, cold=True),
    }
    rivals |= diffusers_ways(many, asked, folder)
    times = interleaved(rivals, asked.rounds)
    for name, took in medians(times).items():
        print(f"{asked.rows} rows  {name:36s} {1000 * took:9.1f} ms", flush=True)
    pairs = zip(times["mixed"], times["one adapter"], strict=True)
    return {"s": medians(times), "mixed_over_one": round(float(np.median([m / o for m, o in pairs])), 4)}


def diffusers_ways(many: list[Adapter], asked: argparse.Namespace, folder: Path) -> dict[str, Callable[[], object]]:
    """One row a call, each under its own adapter, in three ways."""
    pipe = pipelines(asked.base, ["compile"])["diffusers bf16"]
    places = [folder / str(i) for i in range(len(many))]
    for place, one in zip(places, many, strict=True):
        place.mkdir()
        (place / WEIGHTS).write_bytes(one.files()[WEIGHTS])
    plain = pipe.unet
    noise = starting_noise(range(len(many)), (plain.config.in_channels, *[plain.config.sample_size] * 2)).to(pipe.dtype)
    options = {"num_inference_steps": asked.steps, "guidance_scale": 3.0, "output_type": "latent"}

    def rows(unet: Any, before: Callable[[int], object]) -> Callable[[], object]:
        def draw() -> None:
            pipe.unet = unet
            for i in range(len(many)):
                before(i)
                pipe(TEXT, latents=noise[i : i + 1], **options)

        return draw

    pipe.unet = activated = copy.deepcopy(plain)
    for i, place in enumerate(places):
        pipe.load_lora_weights(place, adapter_name=f"a{i}")
    pipe.unet = swapped = copy.deepcopy(plain)
    pipe.load_lora_weights(places[0], adapter_name="live")
    copies = [_merged(pipe, plain, place) for place in places]
    return {
        "diffusers bf16, set_adapters": rows(activated, lambda i: pipe.set_adapters(f"a{i}")),
        "diffusers bf16, hotswap": rows(
            swapped, lambda i: pipe.load_lora_weights(places[i], adapter_name="live", hotswap=True)
        ),
        "diffusers bf16, merged copies": rows(plain, lambda i: setattr(pipe, "unet", copies[i])),
    }


def _merged(pipe: Any, plain: Any, place: Path) -> Any:
    pipe.unet = copy.deepcopy(plain)
    pipe.load_lora_weights(place)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.unet


def swaps(engine: CompiledEngine, asked: argparse.Namespace) -> dict[str, Any]:
    """An adapter after the other through one slot, each new to the bank, and again when all are known."""
    many = [Prompt(TEXT, adapter(engine.spec, 10_000 + i)) for i in range(asked.swaps)]
    bank = SlotBank(engine.bank, 1)
    engine.bank.row(many[0])  # the text encoder is built
    built, before = dict(engine.builds), memory()
    taken: dict[str, list[float]] = {"cold": [], "warm": []}
    for times in taken.values():
        for prompt in many:

            def swap(prompt: Prompt = prompt) -> None:
                bank.hold(prompt)
                bank.release(prompt)

            _ = prompt.key  # the content's hash belongs to loading an adapter, once
            times.append(seconds(swap))
    found = {
        f"{name}_{label}_ms": round(1000 * float(np.percentile(times, q)), 4)
        for name, times in taken.items()
        for label, q in (("median", 50), ("p99", 99))
    }
    kept = len(many) * bank.table[0].nbytes
    grown = memory() - before - kept
    result = {
        **found,
        "swaps": bank.swaps,
        "builds": dict(engine.builds) != built,
        "grown_mib": round(grown / 2**20, 1),
    }
    print(result, flush=True)
    return result


def memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def throughput(engine: CompiledEngine, asked: argparse.Namespace) -> dict[str, float]:
    """Pictures a second when each row's adapter is drawn from a set of so many, all of them seen before."""
    spec, rows = engine.spec, asked.rows
    course = dpm_course(spec.schedule, asked.steps)
    noise = starting_noise(range(rows), (spec.channels, spec.latent_size, spec.latent_size))
    known = {size: [Prompt(TEXT, adapter(spec, 20_000 + i)) for i in range(size)] for size in asked.sets}
    banks = {size: SlotBank(engine.bank, 2 * rows) for size in asked.sets}
    pick = random.Random(0)

    def batch(size: int) -> None:
        prompts = pick.choices(known[size], k=rows)
        slots = torch.tensor([banks[size].hold(prompt) for prompt in prompts])
        running = begin(noise, course)
        for _ in range(asked.steps):
            running = step(lambda z, t: engine.denoise(z, t, banks[size].table, slots), running)
        for prompt in prompts:
            banks[size].release(prompt)

    for prompts in known.values():
        for prompt in prompts:
            engine.bank.row(prompt)
    rivals = {str(size): lambda size=size: batch(size) for size in asked.sets}
    rates = {size: round(rows / took, 3) for size, took in medians(interleaved(rivals, asked.rounds)).items()}
    print("pictures/s by adapters in use:", rates, flush=True)
    return rates


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--base", default=BUILTIN)
    arguments.add_argument("--rows", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--steps", type=int, default=4)
    arguments.add_argument("--swaps", type=int, default=1000)
    arguments.add_argument("--sets", type=int, nargs="+", default=[1, 10, 100, 1000])
    arguments.add_argument("--threads", type=int)
    arguments.add_argument("--bundle", type=Path, help="an OpenVINO bundle of the base, to save making one")
    asked = arguments.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = asked.bundle
        if bundle is None:
            base = cpserve.load_base(asked.base)
            bundle = plan_export(base, folder / "bundle", Target(runner="openvino")).execute().root
        with OpenvinoEngine(bundle, asked.threads) as engine:
            result = {"swap": swaps(engine, asked), "throughput": throughput(engine, asked)}
            result["mixed"] = mixed(engine, asked, folder)
            how = {"base": asked.base, "engine": engine.kind, "precision": engine.precision, "rows": asked.rows}
    took = round(time.monotonic() - began)
    keep("swap", {**how, "steps": asked.steps, "rounds": asked.rounds, **result, "took_s": took})


if __name__ == "__main__":
    main()
