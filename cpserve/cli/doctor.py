"""`cpserve doctor`."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import click

from cpserve.cli._common import BASE, Common, common_options, examples, open_base
from cpserve.cli._show import emit, note, pairs
from cpserve.errors import CpserveError, EngineError

LIBRARIES = ("cpserve", "torch", "diffusers", "transformers", "peft", "onnx", "onnxscript")
RUNNERS = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13-bindings")
TOP_LEVEL = ("trainer", "export", "adapter_store")  # names that another distribution may use too
HOME = Path(__file__).resolve().parents[2]  # where ours lie

Facts = dict[str, Any]


@click.command(epilog=examples("cpserve doctor", "cpserve doctor --bundle bundle --json"))
@click.option(
    "--bundle",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also say what runs this engine bundle, and how fast.",
)
@common_options
@click.pass_context
def doctor(ctx: click.Context, common: Common, bundle: Path | None) -> None:
    """Say what is installed, and what is amiss.

    Exit 1 if the bundle cannot be used.
    """
    common.set_threads()
    providers, broken = _providers()
    installed = {name: _version(name) or "not installed" for name in (*LIBRARIES, *RUNNERS)}
    facts = {
        "installed": installed | {"onnxruntime_providers": ", ".join(providers) or "none"},
        "machine": _machine(),
        "store": _store(common),
        "base": _base(common),
        "engine": _engine(providers),
    }
    unusable = False
    if bundle:
        try:
            facts["bundle"] = _bundle(common, bundle)
        except CpserveError as error:
            facts["bundle"], unusable = {"at": str(bundle), "error": str(error), "hint": error.hint}, True
    warnings = [*broken, *two_runtimes(), *shadows()]
    text = "\n\n".join(f"{title}\n{pairs(values, indent=2)}" for title, values in facts.items())
    emit(facts | {"warnings": warnings}, text, as_json=common.json)
    for warning in warnings:
        note(warning)
    if unusable:
        ctx.exit(1)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _providers() -> tuple[list[str], list[str]]:
    """ONNX Runtime's providers here, and a warning if it is installed and cannot be loaded."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return [], []
    except ImportError as error:
        return [], [f"onnxruntime cannot be loaded: {error}"]
    return list(onnxruntime.get_available_providers()), []


def _machine() -> Facts:
    import torch

    from cpserve.engine import torch_device
    from trainer.loop import faster_precision

    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "training_in": "bfloat16" if isinstance(faster_precision(torch_device()), torch.autocast) else "float32",
        "cuda": torch.cuda.is_available(),
    }


def _store(common: Common) -> Facts:
    store = common.store
    return {
        "at": str(store.root),
        "adapters": len(store.names()),
        "bytes": sum(map(_bytes, store.root.rglob("*"))),
    }


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # somebody else's temporary file, gone by now
        return 0


def _base(common: Common) -> Facts:
    from msgspec import to_builtins

    try:
        entry = open_base(common, None).spec.entry
    except CpserveError as error:
        return {"id": BASE, "error": str(error)}
    return {"id": entry.id, **to_builtins(entry.fingerprint)}


def _engine(providers: list[str]) -> Facts:
    """What `auto` comes to, and where each engine would run."""
    from cpserve.engine import torch_device
    from cpserve.engines.eager import half_precision

    device = torch_device()
    half = str(half_precision(device)).removeprefix("torch.")
    return {
        "auto": "eager, where no bundle is given; else the engine that the bundle was made for",
        "eager": f"torch on {device}, in float32",
        "compile": f"the same through torch.compile, the UNet in {half}",
        "onnx": ", ".join(providers) or "not here: pip install 'cpserve[cpu]'",
        "openvino": _openvino(),
        "trt": _trt(),
    }


def _openvino() -> str:
    from cpserve.engines.openvino import DEVICE, load_core, precisions

    try:
        return f"{DEVICE}, in {', '.join(precisions(load_core()))}"
    except EngineError as error:
        return f"not here: {error.hint}"


def _trt() -> str:
    from cpserve.engines.trt import load_tensorrt

    try:
        name = load_tensorrt().__name__
    except EngineError as error:
        return f"not here: {error.hint}"
    import torch

    return f"{name}{'' if torch.cuda.is_available() else ': builds plans; no GPU to run them on'}"


def _bundle(common: Common, path: Path) -> Facts:
    """What `auto` makes of a bundle, and how long its UNet takes for a picture's step: two rows, with guidance."""
    import torch

    from cpserve.engine import open_engine
    from cpserve.prompts import Prompt

    with open_engine(bundle=path, threads=common.threads) as engine:
        spec = engine.spec
        bank, slot = engine.bank.packed([Prompt(""), Prompt("a photo")])
        side = (engine.signature.sizes or (spec.latent_size,))[0]
        latents, t = torch.zeros(2, spec.channels, side, side), torch.full((2,), 500.0)
        rows = latents.to(engine.device), t.to(engine.device), bank, slot
        engine.denoise(*rows)  # builds
        times = []
        for _ in range(5):
            began = time.perf_counter()
            engine.denoise(*rows).cpu()
            times.append(time.perf_counter() - began)
        return {
            "base": spec.entry.id,
            "engine": engine.kind,
            "precision": engine.precision,
            "ms_a_step": round(1000 * statistics.median(times), 2),
        }


def two_runtimes() -> list[str]:
    """A warning where both builds of ONNX Runtime are installed: they share one folder, and the later one wins."""
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        return ["onnxruntime and onnxruntime-gpu overwrite each other: pip uninstall both, then install one again"]
    return []


def shadows() -> list[str]:
    """A warning for each of our top-level packages that another distribution brings too, or that Python finds elsewhere."""
    owners = packages_distributions()
    warnings = []
    for name in TOP_LEVEL:
        others = sorted(set(owners.get(name, [])) - {"cpserve"})
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parents[1] if spec and spec.origin else None
        if found and found != HOME:
            warnings.append(f"Python finds the package {name!r} in {found} instead of cpserve's: remove that one")
        elif others:
            warnings.append(
                f"the package {name!r} is also brought by {', '.join(others)}: one of them may stop working"
            )
    return warnings
