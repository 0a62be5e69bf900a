"""A bundle's ONNX graphs on the CPU, through OpenVINO, in bfloat16 where the bundle asks for it and the CPU has it.

Every graph with rows is compiled for the shapes that are really used: with free axes OpenVINO leaves half of its
fusions out (measured on the built-in base's UNet: two to three times slower at one and two rows). Half of a call's rows on
half of the cores, twice at the same time, takes less than all rows on all cores: fewer cores wait for each other after each
of a graph's few hundred operations (the same UNet in a sampler, two cores: 17 % less at two rows, 6 % at sixteen).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from cpserve.engines.compiled import ANY, CompiledEngine, Runner, Shape
from cpserve.errors import EngineError

DEVICE = "CPU"
STREAMS = 2
HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}
# the others run once a prompt or a picture, so that speed gains nothing and exactness costs nothing
LOWERED = ("unet", "vae_decoder")


class OpenvinoEngine(CompiledEngine):
    """One compiled model for each graph and shape; slots, prompts and adapters are free."""

    kind = "openvino"

    def _load(self) -> None:
        self._core = load_core()
        recipe = self.bundle.manifest.recipe
        self.rows = recipe.rows
        self.precision = recipe.precision if recipe.precision in precisions(self._core) else "float32"
        self.streams = min(STREAMS, self.threads or os.cpu_count() or 1) if 1 in self.rows else 1

    def compiled(self, graph: str, shape: Shape = ANY, streams: int = 1) -> Any:
        """OpenVINO's own compiled model of a graph whose first input has `shape`; each of `streams` gets its share of the cores."""
        model = self._core.read_model(self.bundle.graph(graph))
        if shape != ANY:
            axes = dict(zip("BChw", shape, strict=True)) | {"P": -1}  # the number of prompts stays free
            model.reshape(self.signature.shapes(axes) if graph == "unet" else shape)
        if graph == "kv_slope":
            _unshare(model)
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[self._precision(graph)],
        }
        if streams > 1:
            hints["NUM_STREAMS"] = str(streams)
        if self.threads:
            hints["INFERENCE_NUM_THREADS"] = str(self.threads)
        return self._core.compile_model(model, DEVICE, hints)

    def _precision(self, graph: str) -> str:
        held = graph != "vae_decoder" or self.precision != "float16" or self.spec.half_decoder
        return self.precision if graph in LOWERED and held else "float32"

    def _build(self, graph: str, shape: Shape, streams: int) -> Runner:
        compiled = self.compiled(graph, shape, streams)
        requests = cycle([compiled.create_infer_request() for _ in range(streams)])

        def begin(*inputs: Tensor) -> Callable[[], Tensor]:
            given = [t.detach().contiguous().numpy() for t in inputs]
            request = next(requests)
            request.start_async(given, share_inputs=True)

            def output() -> Tensor:
                request.wait()
                # a copy: the request writes its next output into the same memory
                result = torch.from_numpy(request.get_output_tensor(0).data.copy())
                given.clear()  # they had to live so long
                return result

            return output

        return begin


def _unshare(model: Any) -> None:
    """A copy of a weight for each of its users: OpenVINO takes a square matrix that is used both ways, as backward passes do, for
    the same packed weights (2026.4: wrong by as much as the output is large).
    """
    from openvino import op

    for constant in [o for o in model.get_ops() if o.get_type_name() == "Constant"]:
        for user in list(constant.output(0).get_target_inputs())[1:]:
            user.replace_source_output(op.Constant(constant.data.copy()).output(0))


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
