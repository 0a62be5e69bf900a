"""A module that takes a gradient inside, as a graph of plain operators: what the ONNX exporter cannot trace by itself.

Fixed shapes only. The decompositions that torch lacks are here; all are of layers that a UNet has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def traced(module: nn.Module, *example: Tensor) -> fx.GraphModule:
    """`module` for inputs shaped as `example`, forward and backward in one graph. Its weights must be frozen."""
    ours = {
        aten.convolution_backward.default: _convolution_backward,
        aten.slice_backward.default: _slice_backward,
        aten.upsample_nearest2d_backward.default: _upsample_backward,
    }
    table = {op: how for op, how in core_aten_decompositions().items() if "upsample_nearest2d" not in str(op)}
    made: fx.GraphModule = make_fx(module, decomposition_table=table | ours)(*example)
    return made


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, _bias: Any, *how: Any) -> tuple[Tensor, None, None]:
    """By the input: the transposed convolution."""
    stride, padding, dilation, _, _, groups, _ = how
    sides = zip(x.shape[2:], grad.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    cut = [n - ((g - 1) * s - 2 * p + d * (k - 1) + 1) for n, g, k, s, p, d in sides]  # what a stride did not reach
    return aten.convolution(grad, weight, None, stride, padding, dilation, True, cut, groups), None, None


def _slice_backward(grad: Tensor, sizes: list[int], dim: int, start: int, end: int, _step: int) -> Tensor:
    after = [0, 0] * ((len(sizes) - 1 - dim) if dim >= 0 else (-1 - dim))
    padded: Tensor = aten.constant_pad_nd(grad, [*after, start, sizes[dim] - min(end, sizes[dim])])
    return padded


def _upsample_backward(grad: Tensor, _size: Any, sizes: list[int], *_scales: Any) -> Tensor:
    """Of whole factors: each pixel's copies, summed."""
    b, c, h, w = sizes
    return grad.reshape(b, c, h, grad.shape[2] // h, w, grad.shape[3] // w).sum((3, 5))
