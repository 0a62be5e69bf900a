"""Torch modules in, ONNX files out: the UNet with its packed K,V, and the text encoder and VAE beside it.

Knows how to trace; does not know what a bundle is (`build.py`). Every graph takes and gives float32, all but the slope at
any batch, picture size and number of prompts; the UNet and the decoder may compute in float16 inside. VAE graphs speak latents
of unit scale, as `BaseModel` does: no runner scales them again.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from cpserve.base import BaseModel
from cpserve.bundle import Precision
from cpserve.slope import SlopeOfError
from export.plain_backward import traced

OPSET = 20  # the last one that ONNX Runtime's CPU kernels cover entirely
Axes = dict[int, Any]


@dataclass(frozen=True, eq=False)
class Graph:
    """One ONNX file to be: the torch module that it stands for, an example of its inputs by name, their free axes
    (none: it takes just such inputs).
    """

    name: str
    what: str
    module: nn.Module
    example: dict[str, Tensor]
    free: tuple[Axes, ...]
    output: str


class _Call(nn.Module):
    """A method of `BaseModel` as a module; the `parts` that it uses are registered, for the tracer to find."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module | None) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(part for part in parts if part is not None)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class _Half(_Call):
    """The same in float16 inside. Timesteps and sizes stay as they are: float16 knows no fractions of large numbers."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*(x.half() if x.ndim > 2 else x for x in inputs)).float()


def graphs(base: BaseModel, precision: Precision = "float32", *, slopes: bool = False) -> tuple[Graph, ...]:
    """The graphs of a base model, with `slopes` five; the UNet and, if it can, the decoder compute in `precision`."""
    unet, (encoder, decoder) = _unet(base), _vae(base)
    if precision == "float16":
        half = replace(base, unet=copy.deepcopy(base.unet).half(), vae=copy.deepcopy(base.vae).half())
        unet = replace(unet, module=_Half(half.unet, half.unet))
    if precision == "float16" and base.spec.half_decoder:
        decoder = replace(decoder, module=_Half(half.decode, half.vae.decoder, half.vae.post_quant_conv))  # type: ignore[arg-type]
    return (unet, _text_encoder(base), encoder, decoder, *([_slope(base)] if slopes else []))


# Axes of an example differ from each other and are more than one, else the tracer takes them for equal or constant.


def _unet(base: BaseModel) -> Graph:
    spec = base.spec
    latents = torch.zeros(3, spec.channels, 2 * spec.multiple, 3 * spec.multiple)
    example = (
        latents,
        torch.tensor([1.0, 250.0, 700.0]),
        torch.zeros(2, spec.tokens, spec.sites.packed_width),
        torch.tensor([1, 0, 1]),
        *(sizes.clone() for sizes in spec.sizes(latents)),
    )
    rows = Dim("B")
    free: tuple[Axes, ...] = ({0: rows} | _sides(spec.multiple), {0: rows}, {0: Dim("P")}, {0: rows}, {0: rows})
    names = [tensor.name for tensor in spec.signature.inputs]
    return Graph(
        "unet",
        "the UNet, one for every adapter",
        base.unet,
        dict(zip(names, example, strict=True)),
        free[: len(example)],
        spec.signature.output.name,
    )


def _slope(base: BaseModel) -> Graph:
    spec = base.spec
    latents = torch.zeros(1, spec.channels, spec.latent_size, spec.latent_size)
    example = {
        "latents": latents,
        "timestep": torch.zeros(1),
        "kv": torch.zeros(1, spec.tokens, spec.sites.packed_width),
        "target": latents.clone(),  # the tracer tells inputs apart by identity
    }
    example |= dict(zip(["added"], spec.sizes(latents), strict=False))
    return Graph("kv_slope", "the slope of the UNet's error by K,V", SlopeOfError(base.unet), example, (), "slope")


def _text_encoder(base: BaseModel) -> Graph:
    spec = base.spec
    example = {
        "ids": torch.zeros(2, spec.tokens, dtype=torch.int64),
        "extra": torch.zeros(3, spec.sites.weight.shape[1]),
    }
    module = _Call(base.encode_text, base.text_encoder)
    return Graph(
        "text_encoder",
        "the text encoder, with rows for learned tokens",
        module,
        example,
        ({0: Dim("P")}, {0: Dim("E")}),
        "e",
    )


def _vae(base: BaseModel) -> tuple[Graph, Graph]:
    spec, vae = base.spec, base.vae
    latents = torch.zeros(3, spec.channels, 4, 6)
    pictures = torch.zeros(3, 3, 4 * spec.vae_factor, 6 * spec.vae_factor)
    rows = {0: Dim("B")}
    encode = _Call(base.encode_pictures, vae.encoder, vae.quant_conv)  # type: ignore[arg-type]
    decode = _Call(base.decode, vae.decoder, vae.post_quant_conv)  # type: ignore[arg-type]
    return (
        Graph(
            "vae_encoder",
            "pictures to latents",
            encode,
            {"pictures": pictures},
            (rows | _sides(spec.vae_factor),),
            "latents",
        ),
        Graph("vae_decoder", "latents to pictures", decode, {"latents": latents}, (rows | _sides(1),), "pictures"),
    )


def _sides(multiple: int) -> Axes:
    """Height and width, free in steps of `multiple`: said to the tracer, it keeps floor divisions out of the graph."""
    h, w = Dim("h"), Dim("w")
    return {2: multiple * h, 3: multiple * w} if multiple > 1 else {2: h, 3: w}


def write_graph(graph: Graph, folder: Path) -> None:
    """Trace and save `<name>.onnx`. Weights past 1.5 GiB go to a file beside it, since protobuf ends at 2 GiB."""
    inputs = tuple(graph.example.values())
    shapes: tuple[Any, ...] | None = graph.free or None
    if isinstance(graph.module, _Call):
        shapes = (shapes,)  # the tracer sees one argument, `*inputs`
    with _plain_upsampling(graph.module), _quiet(), torch.no_grad():
        module = traced(graph.module, *inputs) if isinstance(graph.module, SlopeOfError) else graph.module
        program = torch.onnx.export(
            module,
            inputs,
            input_names=list(graph.example),
            output_names=[graph.output],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    if program is None:
        raise RuntimeError("torch.onnx.export(dynamo=True) returns a program")
    # the exporter notes on every node where in its Python sources it came from: a quarter of a small file, and private
    ClearMetadataAndDocStringPass()(program.model)
    program.save(str(folder / f"{graph.name}.onnx"))


@contextmanager
def _plain_upsampling(module: nn.Module) -> Iterator[None]:
    """Upsampling without diffusers' two branches on size, which would bound the batch at 63 in the traced graph.

    The branches only choose a memory layout; ONNX has none.
    """
    from diffusers.models.upsampling import Upsample2D

    plain = [
        m for m in module.modules() if isinstance(m, Upsample2D) and m.interpolate and m.use_conv and m.norm is None
    ]
    plain = [m for m in plain if m.name == "conv" and not m.use_conv_transpose]
    for upsample in plain:
        upsample.forward = MethodType(_upsample, upsample)
    try:
        yield
    finally:
        for upsample in plain:
            del upsample.forward


def _upsample(self: Any, hidden_states: Tensor, _output_size: None = None) -> Tensor:
    doubled = nn.functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
    return self.conv(doubled)  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on libraries that are not installed and on its own deprecations."""
    logger = logging.getLogger("torch.onnx._internal.exporter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
