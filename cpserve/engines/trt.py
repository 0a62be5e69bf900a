"""A bundle's TensorRT plans on an NVIDIA GPU: one plan a graph, one execution context and one CUDA graph a shape.

Written against `tensorrt` and `tensorrt_rtx`, whose Python interfaces agree in what is used here. Graphs without a plan
(the text encoder and the VAE's encoder, which run once a prompt or a picture, and the slope) run in ONNX Runtime.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cpserve.engines.compiled import ANY, Runner, Shape
from cpserve.engines.ort import OrtEngine
from cpserve.errors import EngineError

MODULES = ("tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt")
PLANS = ("unet", "vae_decoder")


class TrtEngine(OrtEngine):
    """Weights are on the GPU once, whatever the number of shapes, adapters and prompts."""

    kind = "trt"

    def _load(self) -> None:
        recipe = self.bundle.manifest.recipe
        if recipe.runner != "trt":
            raise EngineError("the bundle holds no TensorRT plans", hint="make one that does: cpserve export --trt")
        super()._load()
        self._trt = load_tensorrt()
        if not torch.cuda.is_available():
            raise EngineError("there is no NVIDIA GPU here", hint="the bundle's graphs also run with --engine onnx")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.rows, self.precision = recipe.rows, recipe.precision
        self._engines: dict[str, Any] = {}

    def close(self) -> None:
        super().close()
        self._engines.clear()

    def _runner(self, graph: str, shape: Shape, streams: int = 1) -> Runner:
        return super()._runner(graph, shape if graph in PLANS else ANY, streams)

    def _build(self, graph: str, shape: Shape, streams: int) -> Runner:
        if graph not in PLANS:
            return super()._build(graph, shape, streams)
        axes = dict(zip("BChw", shape, strict=True)) | {"P": shape[0]}
        inputs = self.signature.shapes(axes) if graph == "unet" else {"latents": shape}
        return PlanRunner(self._trt, self._engine(graph), inputs)

    def _engine(self, graph: str) -> Any:
        if graph not in self._engines:
            runtime = self._trt.Runtime(logger(self._trt))
            engine = runtime.deserialize_cuda_engine((self.bundle.root / f"{graph}.plan").read_bytes())
            if engine is None:
                raise EngineError(
                    f"{graph}.plan does not run on this GPU",
                    hint=f"it was built for {', '.join(self.bundle.manifest.recipe.gpus) or 'another one'}: export again",
                )
            self._engines[graph] = engine
        return self._engines[graph]


class PlanRunner:
    """An execution context for one shape: fixed buffers on the GPU, replayed as one CUDA graph."""

    def __init__(self, trt: Any, engine: Any, inputs: dict[str, Shape]) -> None:
        """`inputs` are the shapes by name, one of the plan's profiles."""
        self.context = engine.create_execution_context()
        self.stream = torch.cuda.Stream()
        self.context.set_optimization_profile_async(profile_of(engine, inputs), self.stream.cuda_stream)
        for name, shape in inputs.items():
            self.context.set_input_shape(name, shape)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        types = {trt.DataType.FLOAT: torch.float32, trt.DataType.INT64: torch.int64}
        self.buffers = {
            name: torch.zeros(
                tuple(self.context.get_tensor_shape(name)), dtype=types[engine.get_tensor_dtype(name)], device="cuda"
            )
            for name in names
        }
        for name, buffer in self.buffers.items():
            self.context.set_tensor_address(name, buffer.data_ptr())
        self.inputs = [self.buffers[name] for name in inputs]
        [self.output] = [self.buffers[name] for name in names if name not in inputs]
        self.stream.wait_stream(torch.cuda.current_stream())  # on which the buffers are made zeros
        with torch.cuda.stream(self.stream):
            self._enqueue()  # the first run allocates, which must not be captured
        self.stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._enqueue()

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise EngineError("TensorRT refused to run the plan", hint="export again on this machine")

    def __call__(self, *inputs: Tensor) -> Callable[[], Tensor]:
        if len(inputs) > 1:
            inputs = (*inputs[:2], *used(*inputs[2:4]), *inputs[4:])
        for buffer, given in zip(self.inputs, inputs, strict=True):
            buffer[: len(given)].copy_(given, non_blocking=True)  # the bank may hold fewer prompts than rows
        self.graph.replay()
        return self.output.clone().detach


def used(kv_bank: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """The bank `[P,S,W]` cut down to the prompts that `slot [B]` speaks of, if there are more of them than rows."""
    if len(kv_bank) <= len(slot):
        return kv_bank, slot
    kept, renumbered = slot.unique(return_inverse=True)
    return kv_bank[kept], renumbered


def profile_of(engine: Any, inputs: dict[str, Shape]) -> int:
    """The number of the optimisation profile that holds these shapes.

    Raises:
        EngineError: there is none.
    """
    for i in range(engine.num_optimization_profiles):
        bounds = {name: engine.get_tensor_profile_shape(name, i) for name in inputs}
        if all(
            lo <= n <= hi
            for name, shape in inputs.items()
            for lo, n, hi in zip(bounds[name][0], shape, bounds[name][2], strict=True)
        ):
            return i
    raise EngineError(
        f"the plan holds no profile for {inputs}", hint="export again with the --batch and --sizes you need"
    )


@cache
def load_tensorrt() -> Any:
    """TensorRT-RTX's module, or else TensorRT's.

    Raises:
        EngineError: neither is installed.
    """
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):  # the libraries that it loads are missing
            continue
    raise EngineError("TensorRT is not installed", hint="pip install 'cpserve[trt]'")


@cache
def logger(trt: Any) -> Any:
    """TensorRT wants one for the whole process."""
    return trt.Logger(trt.Logger.ERROR)
