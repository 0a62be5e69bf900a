"""What a bundle is made for: the runner, the precision and the shapes that are compiled. Decides; builds nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cpserve.errors import EngineError

if TYPE_CHECKING:  # the command line names the GPUs without an import of torch
    from cpserve.base import BaseModel
    from cpserve.bundle import Precision, RunnerName

LARGE = 1 << 29  # bytes of UNet weights, above which they are compiled for one row count only, since each keeps a copy
ROWS = (1, 2, 4, 8, 16, 32)
CPU_ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 16)  # compiled when they are first needed; more in one slice gain nothing
GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")  # that tensorrt-rtx builds for
DEFAULT_GPUS = ("sm86", "sm89", "sm120")  # GeForce 30, 40 and 50


@dataclass(frozen=True)
class Target:
    """`precision` None is the fastest sound one here; `rows` are row counts, `sizes` sides in pixels, `gpus` as in `GPUS`.
    `slopes`: with what `classify` asks few of many labels by.
    """

    runner: RunnerName = "onnx"
    precision: Precision | None = None
    rows: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()
    slopes: bool = False


def resolve(target: Target, base: BaseModel) -> Target:
    """The target with nothing left open.

    Raises:
        EngineError: the runner is not installed, or cannot do what is asked.
    """
    if target.runner == "onnx":
        return _onnx(target)
    target = replace(
        target,
        rows=tuple(sorted(set(target.rows))) or _rows(base, target.runner),
        sizes=tuple(sorted(set(target.sizes))) or (base.spec.pixels,),
    )
    step, own = 8 * base.spec.vae_factor, base.spec.pixels  # as `drawing` has it
    if odd := [side for side in target.sizes if side % step and side != own]:
        raise EngineError(f"{odd[0]} pixels cannot be drawn", hint=f"this base takes multiples of {step}")
    if target.slopes and own not in target.sizes:
        raise EngineError(f"slopes are of {own} by {own} pixels", hint=f"add {own} to --sizes, or leave out --slopes")
    return _openvino(target) if target.runner == "openvino" else _trt(target)


def _rows(base: BaseModel, runner: RunnerName) -> tuple[int, ...]:
    weights = sum(p.numel() * p.element_size() for p in base.unet.parameters())
    if weights >= LARGE:
        return (2,)  # a picture and its guidance
    return CPU_ROWS if runner == "openvino" else ROWS


def _onnx(target: Target) -> Target:
    if target.rows or target.sizes:
        raise EngineError("ONNX Runtime's graphs take every batch and size", hint="leave out --batch and --sizes")
    if target.precision == "bfloat16":
        raise EngineError("ONNX Runtime has no bf16 kernels on a CPU", hint="use --openvino, or --precision fp32")
    return replace(target, precision=target.precision or "float32")


def _openvino(target: Target) -> Target:
    from cpserve.engines.openvino import load_core, precisions

    here = precisions(load_core())
    precision = target.precision or ("bfloat16" if "bfloat16" in here else "float32")
    if precision not in here:
        raise EngineError(f"this CPU does not compute in {precision}", hint=f"it does in {', '.join(here)}")
    return replace(target, precision=precision)


def _trt(target: Target) -> Target:
    if target.precision == "bfloat16":
        raise EngineError(
            "a plan is bf16 if its graph is, and such a graph cannot be compared with torch on a CPU",
            hint="use --precision fp16 or fp32",
        )
    import torch

    from cpserve.engines.trt import load_tensorrt
    from export.plan_from_onnx import ahead_of_time

    target = replace(target, precision=target.precision or "float32")
    if ahead_of_time(load_tensorrt()):
        return replace(target, gpus=tuple(sorted(set(target.gpus or DEFAULT_GPUS))))
    if target.gpus or not torch.cuda.is_available():
        raise EngineError("TensorRT builds plans for the GPU at hand only", hint="pip install 'cpserve[trt]' for all")
    return replace(target, gpus=("sm{}{}".format(*torch.cuda.get_device_capability()),))
