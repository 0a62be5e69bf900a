"""`cpserve export --merge`: a LoRA's file, or a stored version, here or on the Hub."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import click

from cpserve.cli._common import Common


class MergeParam(click.ParamType[tuple[str, float]]):
    """A path or a reference, and a scale after a colon."""

    name = "lora[:scale]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        what, _, scale = value.rpartition(":")
        if what in {"", "hf"} or Path(value).exists():
            return value, 1.0
        try:
            if math.isfinite(number := float(scale)):
                return what, number
        except ValueError:
            pass
        raise click.BadParameter(f"{scale!r} is not a scale", ctx, param)


def at_hand(common: Common, what: str) -> Path:
    """The path itself, or a version's weights as a file that is there until the command ends.

    Raises:
        RefError: it is neither a path nor a version.
        IntegrityError: the version's weights are damaged.
    """
    if not what.startswith("hf://") and (Path(what).exists() or what.endswith(".safetensors") or "/" in what):
        return Path(what)
    from cpserve.manifest import WEIGHTS

    version = common.store.version(what)
    place = Path(click.get_current_context().with_resource(tempfile.TemporaryDirectory()))
    folder = place / str(version).replace("/", "_")  # sentences about it then name the version
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(version.read(WEIGHTS))
    return folder
