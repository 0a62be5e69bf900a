"""A bundle's ONNX graphs on the CPU, through ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpserve.bundle import read_bundle
from cpserve.engine import Engine
from cpserve.errors import EngineError


class OrtEngine(Engine):
    """Opens each graph's session once, when it is first needed; `builds` counts them. Adapters never cause one."""

    kind = "onnx"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """`threads` is how many a graph may use (None: as many as there are cores).

        Raises:
            EngineError: the folder is no sound bundle, or ONNX Runtime is not installed.
        """
        self.bundle = read_bundle(path)
        super().__init__(self.bundle.spec)
        self.threads = threads
        self.builds: Counter[str] = Counter()
        self._sessions: dict[str, Any] = {}
        self._runtime  # noqa: B018 a missing library is reported now, not at the first picture

    @cached_property
    def _runtime(self) -> Any:
        try:
            import onnxruntime
        except ImportError:
            raise EngineError("ONNX Runtime is not installed", hint="pip install 'cpserve[cpu]'") from None
        return onnxruntime

    def infer(self, latents: Tensor, timestep: Tensor, kv_bank: Tensor, slot: Tensor) -> Tensor:
        return self._run("unet", latents, timestep, kv_bank, slot)

    def encode_text(self, ids: Tensor, extra: Tensor) -> Tensor:
        return self._run("text_encoder", ids, extra)

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        return self._run("vae_encoder", pictures)

    def decode(self, latents: Tensor) -> Tensor:
        return self._run("vae_decoder", latents)

    def close(self) -> None:
        super().close()
        self._sessions.clear()

    def _run(self, graph: str, *inputs: Tensor) -> Tensor:
        session = self._session(graph)
        names = [i.name for i in session.get_inputs()]
        given = {n: t.detach().contiguous().numpy() for n, t in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    def _session(self, graph: str) -> Any:
        if self._closed:
            raise EngineError("the engine is closed", hint="open it again with open_engine()")
        if graph not in self._sessions:
            options = self._runtime.SessionOptions()
            options.intra_op_num_threads = self.threads or 0  # 0: ONNX Runtime asks the machine
            options.log_severity_level = 3
            self._sessions[graph] = self._runtime.InferenceSession(
                self.bundle.graph(graph), options, providers=["CPUExecutionProvider"]
            )
            self.builds[graph] += 1
        return self._sessions[graph]
