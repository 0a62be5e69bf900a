"""A bundle's ONNX graphs through ONNX Runtime: on the GPU where `onnxruntime-gpu` and torch find one, else on the CPU.

Tensors are bound where they lie, and outputs stay where they were computed: on a GPU nothing is copied between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from cpserve.engines.compiled import CompiledEngine, Runner, Shape
from cpserve.errors import EngineError
from cpserve.prompts import CPU

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TYPES = {torch.float32: np.float32, torch.int64: np.int64}


class OrtEngine(CompiledEngine):
    """One session a graph, for every shape."""

    kind = "onnx"

    def _load(self) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise EngineError("ONNX Runtime is not installed", hint="pip install 'cpserve[cpu]'") from None
        self._runtime: Any = onnxruntime
        found = PROVIDERS["cuda"] in onnxruntime.get_available_providers() and torch.cuda.is_available()
        self._place = torch.device("cuda", torch.cuda.current_device()) if found else CPU
        self.device = self._place
        recipe = self.bundle.manifest.recipe
        self.precision = "float32" if recipe.runner == "openvino" else recipe.precision  # whose graphs are float32

    def _build(self, graph: str, shape: Shape, streams: int) -> Runner:  # noqa: ARG002 - a session takes any
        session = self._session(graph)
        names = [i.name for i in session.get_inputs()]
        [output] = [o.name for o in session.get_outputs()]
        place = (self._place.type, self._place.index or 0)

        def begin(*inputs: Tensor) -> Callable[[], Tensor]:
            binding = session.io_binding()
            given = [t.detach().to(self._place).contiguous() for t in inputs]
            for name, tensor in zip(names, given, strict=True):
                binding.bind_input(name, *place, TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
            binding.bind_output(output, *place)
            binding.synchronize_inputs()  # torch and ONNX Runtime have streams of their own
            with enough_memory():
                session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return partial(from_dlpack(binding.get_outputs()[0]).to, self.device)

        return begin

    def _session(self, graph: str) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self.threads or 0  # 0: ONNX Runtime asks the machine
        options.log_severity_level = 3
        if graph != "unet":  # a thread that spins for more work is in the way of torch's threads, which come next
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider = PROVIDERS[self._place.type]
        its_options = {"device_id": self._place.index, "use_tf32": 0}  # float32 is meant where the graph says it
        providers = [(provider, its_options)] if self._place.type == "cuda" else [provider]
        session = self._runtime.InferenceSession(self.bundle.graph(graph), options, providers=providers)
        if provider not in session.get_providers():  # it falls back to the CPU without a word
            raise EngineError(
                "ONNX Runtime cannot use the GPU here",
                hint="install the CUDA and cuDNN that it was built for, or hide the GPU: CUDA_VISIBLE_DEVICES=",
            )
        return session


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn what ONNX Runtime says where there is not enough, an error of no kind of its own, into a MemoryError."""
    try:
        yield
    except Exception as error:
        if "Failed to allocate memory" in str(error):
            raise MemoryError("ONNX Runtime got no more") from error
        raise
