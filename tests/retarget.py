"""Bundles for other runners out of graphs that were traced before: tracing takes most of an export's time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cpserve.base import BaseModel
from cpserve.bundle import Precision
from export import build, onnx_from_unet
from export.build import plan_export
from export.onnx_from_unet import write_graph
from export.target import Target


def retarget(base: BaseModel, traced: Path, out: Path, target: Target) -> Path:
    """Export `base` with the graphs of the bundle `traced`; all else is done for real, the parity check too."""

    def copy(graph: onnx_from_unet.Graph, folder: Path) -> None:
        if (made := traced / f"{graph.name}.onnx").exists():
            shutil.copy(made, folder)
        else:
            write_graph(graph, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "write_graph", copy)
        return plan_export(base, out, target).execute().root


def openvino(base: BaseModel, precision: Precision = "float32") -> Target:
    """Few row counts, so that calls are cut into slices, and the sizes that tests draw: latents of 8, 16 and 24."""
    sizes = tuple(side * base.spec.vae_factor for side in (8, 16, 24))
    return Target(runner="openvino", precision=precision, rows=(1, 2, 4), sizes=sizes)
