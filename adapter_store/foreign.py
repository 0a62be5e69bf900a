"""LoRAs of other programs: read from one safetensors file, looked at before they are believed, and written for others again.

Each is admitted or refused with the reason. What comes out has alpha equal to the rank, the scale folded into B, under
diffusers' names: so it means the same to every loader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save

from adapter_store.card import render_card
from adapter_store.layout import CARD
from adapter_store.lora_keys import OTHER_KINDS, Format, Key, Part, is_kv, parse_key
from adapter_store.tensors import Array, parse_arrays
from adapter_store.version import sha256
from cpserve.errors import AdapterError
from cpserve.lora_header import ROOTS, lora_header
from cpserve.manifest import WEIGHTS, BaseEntry, Manifest, plain

LARGEST_RANK = 1280  # the width of the widest layer of SDXL: more adds nothing


@dataclass(frozen=True, eq=False)
class Lora:
    """By module, the factors A `[r, ...]` and B `[C, r, ...]`, float32; what it adds to the module's weight is `B A`."""

    modules: Mapping[str, tuple[Array, Array]]

    @property
    def layers(self) -> Literal["kv", "other"]:
        """`kv` if it touches nothing but keys and values of the cross-attention."""
        return "kv" if all(map(is_kv, self.modules)) else "other"

    @property
    def others(self) -> list[str]:
        """The modules besides keys and values."""
        return sorted(module for module in self.modules if not is_kv(module))


def read_lora(path: str, content: bytes) -> Lora:
    """Read a LoRA in diffusers' or kohya's names; `path` is for the sentences only.

    Raises:
        AdapterError: it is no safetensors file, or something in it is no LoRA of a UNet and its text encoder.
    """
    parts: dict[str, dict[Part, Array]] = {}
    for name, array in parse_arrays(path, content).items():
        key = parse_key(name)
        if key is None:
            kind = next((kind for sign, kind in OTHER_KINDS.items() if sign in name), "in no names that are known")
            raise AdapterError(
                f"{path}: {plain(name)} is {kind}", hint="LoRAs of Stable Diffusion 1 and 2 are taken, as .safetensors"
            )
        if key.part in parts.setdefault(key.module, {}):
            raise AdapterError(f"{path}: {plain(name)} comes twice, in two ways of naming", hint="take another file")
        parts[key.module][key.part] = array
    if not parts:
        raise AdapterError(f"{path} holds no tensor", hint="take another file")
    header = _header(path, content)
    return Lora({module: _factors(path, module, found, header) for module, found in sorted(parts.items())})


def check_shapes(path: str, lora: Lora, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Hold the keys and values to a base; `shapes` gives C and d of each `unet.` module there.

    Raises:
        AdapterError: the base has no such module, or it has another shape.
    """
    for module, (a, b) in lora.modules.items():
        if is_kv(module) and shapes.get(module) != (len(b), a.shape[1]):
            there = "x".join(map(str, shapes[module])) if module in shapes else "not there"
            raise AdapterError(
                f"{path}: {module} is made for {len(b)}x{a.shape[1]}, in this base it is {there}",
                hint="give the base that it was made for with --base",
            )


def write_lora(lora: Lora, tongue: Format) -> bytes:
    """The file, as diffusers writes it with its header, or as kohya's scripts do with an alpha a module."""
    tensors: dict[str, Any] = {}
    for module, (a, b) in lora.modules.items():
        rank = np.array(float(len(a)), np.float32)
        parts: dict[Part, Any] = {"A": a, "B": b, "alpha": rank} if tongue == "kohya" else {"A": a, "B": b}
        for part, array in parts.items():
            key = Key(module, part)
            tensors[key.kohya if tongue == "kohya" else key.diffusers] = np.asarray(array, order="C")
    ranks = {module: len(a) for module, (a, _) in lora.modules.items()}
    header = lora_header(ranks) if tongue == "diffusers" else {"format": "pt"}
    return bytes(save(tensors, metadata=header))


def _factors(path: str, module: str, found: Mapping[Part, Array], header: Mapping[str, Any]) -> tuple[Array, Array]:
    a, b = found.get("A"), found.get("B")
    if a is None or b is None:
        raise AdapterError(f"{path}: {module} has one factor without the other", hint="the file is not whole")
    plain = a.ndim == b.ndim == 2 or (a.ndim == b.ndim == 4 and b.shape[2:] == (1, 1) and not is_kv(module))
    if not plain or a.shape[0] != b.shape[1] or not 1 <= a.shape[0] <= LARGEST_RANK:
        raise AdapterError(
            f"{path}: the factors of {module} are {a.shape} and {b.shape}, which do not make a LoRA",
            hint=f"ranks from 1 to {LARGEST_RANK} are taken",
        )
    alpha = found["alpha"].reshape(-1).tolist() if "alpha" in found else [_told_alpha(header, module, len(a))]
    if len(alpha) != 1 or not math.isfinite(alpha[0]):
        raise AdapterError(f"{path}: the alpha of {module} is no number", hint="take another file")
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.asarray(b * np.float32(alpha[0] / len(a)), np.float32)
    if not np.isfinite(scaled).all():
        raise AdapterError(f"{path}: the alpha of {module} is too large", hint="take another file")
    return a, scaled


def _header(path: str, content: bytes) -> dict[str, Any]:
    """What diffusers wrote into the file's header; a stranger's text, so what is odd in it counts for nothing."""
    length = int.from_bytes(content[:8], "little")
    try:
        told = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["lora_adapter_metadata"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(told, dict):
        return {}
    for kind in ("use_rslora", "use_dora"):
        if any(told.get(f"{root}.{kind}") for root in ROOTS):
            raise AdapterError(f"{path} was made with {kind}, which is no plain LoRA", hint="take another file")
    return told


def _told_alpha(header: Mapping[str, Any], module: str, rank: int) -> float:
    """A module's alpha by the header: its own, or that of all; without either it is the rank."""
    root, _, name = module.partition(".")
    own = header.get(f"{root}.alpha_pattern")
    patterns = own if isinstance(own, dict) else {}
    told = next(
        (v for k, v in patterns.items() if name == k or name.endswith(f".{k}")), header.get(f"{root}.lora_alpha")
    )
    if not isinstance(told, int | float) or isinstance(told, bool):
        return float(rank)
    try:
        return float(told)
    except OverflowError:
        raise AdapterError(f"the alpha of {plain(module)} is out of range", hint="take another file") from None


def draft_of(lora: Lora, base: BaseEntry, name: str, content: bytes) -> tuple[Manifest, dict[str, bytes]]:
    """What a store keeps of it: the manifest's draft, which says where it came from, and the files."""
    ranks = sorted({len(a) for a, _ in lora.modules.values()})
    settings: dict[str, Any] = {
        "file": name,
        "sha256": sha256(content),
        "modules": len(lora.modules),
        "ranks": [*ranks],
    }
    draft = Manifest(base=base, concepts=(), layers=lora.layers, method="imported", settings=settings)
    return draft, {WEIGHTS: write_lora(lora, "diffusers"), CARD: render_card(draft, name).encode()}
