"""A bundle's ONNX graphs on the CPU, through OpenVINO, in bfloat16 where the bundle asks for it and the CPU has it.

Every graph with rows is compiled for the shapes that are really used: with free axes OpenVINO leaves half of its
fusions out (measured on the built-in base's UNet: two to three times slower at one and two rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpserve.engines.compiled import ANY, CompiledEngine, Runner, Shape, slices
from cpserve.errors import EngineError

DEVICE = "CPU"
HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}
# the others run once a prompt or a picture, so that speed gains nothing and exactness costs nothing
LOWERED = ("unet", "vae_decoder")


class OpenvinoEngine(CompiledEngine):
    """One compiled model for each graph and shape; slots, prompts and adapters are free."""

    kind = "openvino"

    def __init__(self, path: Path, threads: int | None = None, streams: int = 1) -> None:
        """With `streams` a call's rows are cut into so many parts, which run side by side on a share of the `threads` each.

        Raises:
            EngineError: the folder is no sound bundle, or OpenVINO is not installed.
        """
        self.streams = streams
        self._pool = ThreadPoolExecutor(streams) if streams > 1 else None
        super().__init__(path, threads)

    def close(self) -> None:
        super().close()
        if self._pool:
            self._pool.shutdown()

    def _slices(self, rows: int) -> Iterator[slice]:
        share = -(-rows // self.streams)
        return slices(rows, tuple(n for n in self.rows if n <= share) or self.rows[:1])

    def _map(self, call: Callable[[Any], Tensor], calls: list[Any]) -> list[Tensor]:
        return list(self._pool.map(call, calls)) if self._pool and len(calls) > 1 else super()._map(call, calls)

    def _load(self) -> None:
        self._core = load_core()
        recipe = self.bundle.manifest.recipe
        self.rows = recipe.rows
        self.precision = recipe.precision if recipe.precision in precisions(self._core) else "float32"

    def compiled(self, graph: str, shape: Shape = ANY) -> Any:
        """OpenVINO's own compiled model of a graph whose first input has `shape`."""
        model = self._core.read_model(self.bundle.graph(graph))
        if shape != ANY:
            axes = dict(zip("BChw", shape, strict=True)) | {"P": -1}  # the number of prompts stays free
            model.reshape(self.signature.shapes(axes) if graph == "unet" else shape)
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[self.precision if graph in LOWERED else "float32"],
        }
        if self.threads:
            hints["INFERENCE_NUM_THREADS"] = str(self.threads)
        if self.streams > 1:
            hints["NUM_STREAMS"] = str(self.streams)
        return self._core.compile_model(model, DEVICE, hints)

    def _build(self, graph: str, shape: Shape) -> Runner:
        model = self.compiled(graph, shape)
        requests = [model.create_infer_request() for _ in range(self.streams)]

        def run(*inputs: Tensor) -> Tensor:
            given = [t.detach().contiguous().numpy() for t in inputs]
            request = requests.pop()  # there is one for every part that runs at a time
            request.infer(given, share_inputs=True)
            # a copy: the request writes its next output into the same memory
            output = torch.from_numpy(request.get_output_tensor(0).data.copy())
            requests.append(request)
            return output

        return run


def load_core() -> Any:
    """OpenVINO's runtime.

    Raises:
        EngineError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError:
        raise EngineError("OpenVINO is not installed", hint="pip install 'cpserve[openvino]'") from None
    return openvino.Core()


def precisions(core: Any) -> tuple[str, ...]:
    """The precisions that this CPU computes in."""
    can = core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    return tuple(name for name, capability in CAPABILITIES.items() if capability in can)
