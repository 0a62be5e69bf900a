"""Rivals timed fairly: in turns, in an order that changes every round, by their medians; a result is one JSON line, kept."""

from __future__ import annotations

import datetime as dt
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv2d

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "diffusers", "onnxruntime", "onnxruntime-gpu", "openvino")  # those that are here


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def interleaved(rivals: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Each rival's seconds in every round, after one round that is not counted: compilers and caches warm up in it."""
    order, times = list(rivals), {name: [] for name in rivals}
    shuffle = random.Random(0)
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            gc.collect()
            took = seconds(rivals[name])
            if number:
                times[name].append(took)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(all_), 5) for name, all_ in times.items()}


def peak(dtype: torch.dtype, device: torch.device, side: int = 2048, channels: int = 256) -> float:
    """The most FLOP/s that a product of large square matrices or a large convolution reached in six tries each.

    Both, for torch hands them to different libraries, and which is the faster one depends on the CPU and the precision.
    """
    a, b = (torch.randn(side, side).to(device, dtype) for _ in "ab")
    pictures, kernels = (
        torch.randn(*of).to(device, dtype) for of in ((4, channels, 64, 64), (channels, channels, 3, 3))
    )
    product = min(seconds(lambda: float((a @ b)[0, 0])) for _ in range(6))
    convolved = min(seconds(lambda: float(conv2d(pictures, kernels, padding=1)[0, 0, 0, 0])) for _ in range(6))
    return max(2 * side**3 / product, 2 * pictures[:, 0].numel() * kernels.numel() / convolved)


def machine() -> dict[str, Any]:
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "amx": any("amx_bf16" in line for line in _cpuinfo()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def keep(benchmark: str, result: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Print the result as the last line, and append it to `folder`'s."""
    libraries = {each.name: each.version for each in distributions() if each.name in LIBRARIES}
    today = dt.datetime.now(dt.UTC).date().isoformat()
    line = json.dumps({"benchmark": benchmark, "date": today, "machine": machine(), "libraries": libraries, **result})
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{benchmark}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line)


def kept_lines(benchmark: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The lines in `folder`, oldest first."""
    path = folder / f"{benchmark}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
