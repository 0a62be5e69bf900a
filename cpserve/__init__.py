"""Teach a text-to-image diffusion model new concepts one after another; keep every version; draw and recognise them.

Importing costs no torch, disk or network: names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapter_store import Store
    from cpserve.adapter import Adapter
    from cpserve.base import load_base
    from cpserve.concept import read_concept
    from cpserve.drawing import Drawing, generate
    from cpserve.engine import open_engine
    from cpserve.errors import CpserveError
    from cpserve.learning import learn
    from cpserve.prompts import Prompt
    from cpserve.recognition import Judging, classify
    from trainer import Settings

_HOMES = {
    "Adapter": "cpserve.adapter",
    "CpserveError": "cpserve.errors",
    "Drawing": "cpserve.drawing",
    "Judging": "cpserve.recognition",
    "Prompt": "cpserve.prompts",
    "Settings": "trainer",
    "Store": "adapter_store",
    "classify": "cpserve.recognition",
    "generate": "cpserve.drawing",
    "learn": "cpserve.learning",
    "load_base": "cpserve.base",
    "open_engine": "cpserve.engine",
    "read_concept": "cpserve.concept",
}
__all__ = [
    "Adapter",
    "CpserveError",
    "Drawing",
    "Judging",
    "Prompt",
    "Settings",
    "Store",
    "classify",
    "generate",
    "learn",
    "load_base",
    "open_engine",
    "read_concept",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
