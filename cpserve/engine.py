"""Engines: one compiled UNet that serves every adapter, whatever runs it.

`Engine` owns lifetime and checks; the runners in `engines/` only infer. An engine is called like the torch module it stands
for, so there is one sampler and one scorer.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from cpserve.base import BUILTIN, BaseSpec, load_base
from cpserve.engines import ENGINES
from cpserve.errors import EngineError
from cpserve.prompts import CPU, PromptBank


class Engine(ABC):
    """Runs one base model. Use it as a context manager, or call `close`. Its rows may mix prompts, adapters and timesteps.

    Rows, bank and slots are on `device`; pictures, ids and embeddings are moved there.
    """

    kind: str
    precision: str = "float32"  # that the UNet is really computed in
    merged: str = ""  # the LoRAs that its bundle folded into the base, by hash and scale
    device = CPU
    slopes = True  # whether `slope` can be asked for

    def __init__(self, spec: BaseSpec) -> None:
        self.spec = spec
        self.signature = spec.signature
        self._closed = False

    @cached_property
    def bank(self) -> PromptBank:
        """The K,V of prompts seen so far."""
        return PromptBank(self.spec, self.encode_text, self.device)

    def denoise(
        self, latents: Tensor, timestep: Tensor, kv_bank: Tensor, slot: Tensor, added: Tensor | None = None
    ) -> Tensor:
        """The noise `eps [B,4,h,w]` in latents `[B,4,h,w]` at `timestep [B]`, row b under prompt `slot[b]` of `kv_bank [P,S,W]`.

        `added [B,6]` are SDXL's sizes of each row, None for `spec.sizes`.

        Raises:
            EngineError: a row is outside the signature, or the engine is closed.
        """
        self.check_open()
        inputs = (latents, timestep, kv_bank, slot, *(self.spec.sizes(latents) if added is None else (added,)))
        self.signature.check(*inputs)
        output = self.infer(*inputs)
        return self.spec.schedule.eps(output, latents, timestep)

    @abstractmethod
    def infer(self, latents: Tensor, timestep: Tensor, kv_bank: Tensor, slot: Tensor, *added: Tensor) -> Tensor:
        """The UNet's raw output for rows that were checked."""

    def slope(self, latents: Tensor, timestep: Tensor, kv: Tensor, target: Tensor) -> Tensor:
        """The gradient `[B,S,W]` of each row's `||target - output||^2` by its own K,V `kv [B,S,W]`; `output` is the UNet's.
        Latents are of the base's own size.

        Raises:
            EngineError: a row is outside the signature, or of another size; the engine has no slopes (`slopes`), or it is closed.
        """
        self.check_open()
        if not self.slopes:
            raise EngineError("the bundle has no slopes", hint="make it again with cpserve export --slopes")
        added = self.spec.sizes(latents)
        self.signature.check(latents, timestep, kv, torch.arange(len(kv), device=self.device), *added)
        own = self.spec.latent_size
        if latents.shape[2:] != (own, own):
            raise EngineError(f"slopes are of latents {own} by {own}", hint="cut the pictures to the base's own size")
        rows = zip(*(x.split(1) for x in (latents, timestep, kv, target, *added)), strict=True)
        return torch.cat(self.infer_slopes(list(rows)))

    @abstractmethod
    def infer_slopes(self, rows: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        """The gradients of rows that were checked, each of one: the way back needs all of a row's activations."""

    @abstractmethod
    def encode_text(self, ids: Tensor, extra: Tensor) -> Tensor:
        """Text states `[P,S,d+D]` of ids `[P,S]`; ids past the vocabulary are rows of `extra [E,d]`."""

    @abstractmethod
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Latents of unit scale of pictures `[B,3,H,W]` in [-1, 1]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures `[B,3,H,W]` in [-1, 1] of latents of unit scale."""

    def at_work(self) -> AbstractContextManager[None]:
        """Around a loop of calls: what the engine needs of the process meanwhile."""
        return nullcontext()

    def check_open(self) -> None:
        """Raises:
        EngineError: the engine is closed.
        """
        if self._closed:
            raise EngineError("the engine is closed", hint="open it again with open_engine()")

    def close(self) -> None:
        """Let go of the runner's memory. Closing twice is fine."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=1)


def open_engine(
    base: str = BUILTIN,
    *,
    revision: str | None = None,
    token_file: Path | None = None,
    engine: str = "auto",
    bundle: str | Path | None = None,
    threads: int | None = None,
) -> Engine:
    """Open the engine that serves `base`, as `load_base` finds it, or the bundle, which brings its own base.

    `auto` takes what the bundle was made for where one is given, else torch ("eager"): the same call opens the same engine
    everywhere. All but "openvino" run on the GPU where torch finds one; `CUDA_VISIBLE_DEVICES=` hides it. `threads` is how
    many a bundle's graphs may use (None: as many as there are cores).

    Raises:
        EngineError: the kind is unknown; a bundle is missing, not sound or not what the kind runs; its library is not installed.
        BaseModelError: the base cannot be loaded.
    """
    if engine not in ENGINES:
        raise EngineError(f"there is no engine {engine!r}", hint=f"use one of {', '.join(ENGINES)}")
    if bundle is not None and engine in {"eager", "compile"}:
        raise EngineError(f"the {engine} engine runs no bundle", hint="leave out the one or the other")
    if engine in {"eager", "compile"} or (engine == "auto" and bundle is None):
        from cpserve.engines.eager import CompileEngine, EagerEngine

        model = load_base(base, revision=revision, token_file=token_file).to(torch_device())
        return CompileEngine(model) if engine == "compile" else EagerEngine(model)
    if bundle is None:
        raise EngineError(
            f"the {engine} engine runs a bundle", hint=f"make one: cpserve export --{engine} --out BUNDLE"
        )
    return _open_bundle(Path(bundle), engine, threads)


def _open_bundle(bundle: Path, engine: str, threads: int | None) -> Engine:
    from cpserve.bundle import read_manifest

    if engine == "auto":
        engine = read_manifest(bundle).recipe.runner
    if engine == "openvino":
        from cpserve.engines.openvino import OpenvinoEngine

        return OpenvinoEngine(bundle, threads)
    if engine == "trt":
        from cpserve.engines.trt import TrtEngine

        return TrtEngine(bundle, threads)
    from cpserve.engines.ort import OrtEngine

    return OrtEngine(bundle, threads)


def torch_device() -> torch.device:
    """Where torch's engines run: the GPU, if it finds one."""
    return torch.device("cuda") if torch.cuda.is_available() else CPU


def on_grid(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8 `[B,H,W,3]`, on the CPU."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
