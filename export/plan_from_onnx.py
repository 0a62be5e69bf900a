"""ONNX file in, TensorRT plan out. With `tensorrt-rtx` ahead of time, on a machine without a GPU; `tensorrt` needs the GPU."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from cpserve.engines.compiled import Shape
from cpserve.engines.trt import load_tensorrt, logger
from cpserve.errors import EngineError
from cpserve.signature import Signature

Profile = dict[str, Shape]


def ahead_of_time(trt: Any) -> bool:
    """Whether this TensorRT builds for GPUs that are not here."""
    return hasattr(trt, "ComputeCapability") and hasattr(trt.ComputeCapability, "SM86")


def profiles(graph: str, signature: Signature, rows: Shape, sizes: Shape) -> list[Profile]:
    """The inputs' shapes by name, one profile for each row count and side."""
    shapes = []
    for count, side in product(rows, sizes):
        axes = {"B": count, "P": count, "h": side, "w": side}
        every = signature.shapes(axes)
        shapes.append(every if graph == "unet" else {"latents": every["latents"]})
    return shapes


def write_plan(onnx: Path, out: Path, wanted: list[Profile], gpus: tuple[str, ...]) -> None:
    """Build a plan for the `wanted` shapes and architectures (`sm86`; none: the GPU at hand).

    Raises:
        EngineError: TensorRT is not installed, or cannot parse or build the graph; the message is its own.
    """
    trt = load_tensorrt()
    builder = trt.Builder(logger(trt))
    network = builder.create_network(_flags(trt))
    parser = trt.OnnxParser(network, logger(trt))
    if not parser.parse_from_file(str(onnx)):
        raise _refusal(onnx, parser.get_error(0).desc())
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is meant where the graph says it
    for shapes in wanted:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
    if gpus and ahead_of_time(trt):
        config.num_compute_capabilities = len(gpus)
        for i, gpu in enumerate(gpus):
            config.set_compute_capability(getattr(trt.ComputeCapability, gpu.upper()), i)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refusal(onnx, "the builder gave no reason; see the lines above")
    out.write_bytes(plan)


def _flags(trt: Any) -> int:
    """Precision is what the graph says; before release 11 that had to be asked for."""
    strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if strong is None else 1 << int(strong)


def _refusal(onnx: Path, reason: str) -> EngineError:
    return EngineError(f"TensorRT cannot build {onnx.name}: {reason}", hint="nothing was written; use --onnx")
