"""`cpserve doctor`."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import click

from cpserve.cli._common import BASE, Common, common_options, examples, open_base
from cpserve.cli._show import emit, note, pairs
from cpserve.errors import CpserveError

LIBRARIES = ("cpserve", "torch", "diffusers", "transformers", "peft", "onnx", "onnxscript")
RUNNERS = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt")
TOP_LEVEL = ("trainer", "export", "adapter_store")  # names that another distribution may use too
HOME = Path(__file__).resolve().parents[2]  # where ours lie

Facts = dict[str, Any]


@click.command(epilog=examples("cpserve doctor", "cpserve doctor --json"))
@common_options
def doctor(common: Common) -> None:
    """Say what is installed, and what is amiss."""
    common.set_threads()
    providers, broken = _providers()
    installed = {name: _version(name) or "not installed" for name in (*LIBRARIES, *RUNNERS)}
    facts = {
        "installed": installed | {"onnxruntime_providers": ", ".join(providers) or "none"},
        "machine": _machine(),
        "store": _store(common),
        "base": _base(common),
        "engine": _engine(can_run=bool(providers)),
    }
    warnings = [*broken, *two_runtimes(), *shadows()]
    text = "\n\n".join(f"{title}\n{pairs(values, indent=2)}" for title, values in facts.items())
    emit(facts | {"warnings": warnings}, text, as_json=common.json)
    for warning in warnings:
        note(warning)


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

    from trainer.loop import faster_precision

    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "training_in": "bfloat16" if isinstance(faster_precision(), torch.autocast) else "float32",
        "cuda": torch.cuda.is_available(),
    }


def _store(common: Common) -> Facts:
    store = common.store
    size = sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file())
    return {"at": str(store.root), "adapters": len(store.names()), "bytes": size}


def _base(common: Common) -> Facts:
    try:
        entry = open_base(common, None).spec.entry
    except CpserveError as error:
        return {"id": BASE, "error": str(error)}
    return {"id": entry.id, **entry.fingerprint.model_dump()}


def _engine(*, can_run: bool) -> Facts:
    """What `auto` comes to."""
    missing = "onnxruntime is not here: pip install 'cpserve[cpu]'"
    return {
        "auto": "eager",
        "because": "no bundle is given",
        "auto_with_bundle": "onnx" if can_run else "nothing",
        "because_then": "a bundle runs in ONNX Runtime" if can_run else missing,
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
