"""A bundle's ONNX graphs on the CPU, through ONNX Runtime."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpserve.engines.compiled import CompiledEngine, Runner, Shape
from cpserve.errors import EngineError


class OrtEngine(CompiledEngine):
    """One session a graph, for every shape."""

    kind = "onnx"

    def _load(self) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise EngineError("ONNX Runtime is not installed", hint="pip install 'cpserve[cpu]'") from None
        self._runtime: Any = onnxruntime

    def _build(self, graph: str, shape: Shape) -> Runner:  # noqa: ARG002 - a session takes any
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self.threads or 0  # 0: ONNX Runtime asks the machine
        options.log_severity_level = 3
        session = self._runtime.InferenceSession(self.bundle.graph(graph), options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]

        def run(*inputs: Tensor) -> Tensor:
            given = {n: t.detach().contiguous().numpy() for n, t in zip(names, inputs, strict=True)}
            return torch.from_numpy(session.run(None, given)[0])

        return run
