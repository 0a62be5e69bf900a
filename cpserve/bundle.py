"""An engine bundle: a folder that holds everything needed to run one base model, compiled once for every adapter.

    bundle.json                  what it is, what it was made from, the hash of every file
    unet.onnx                    latents, timestep, kv_bank, slot, for SDXL added -> output (`signature.py`)
    text_encoder.onnx            ids [P,S] int64, extra [E,d] float32 -> e [P,S,d+D]; E may be 0
    kv_projections.safetensors   weight [W-D,d], the frozen K,V projections stacked in packing order
    vae_encoder.onnx             pictures [B,3,H,W] in [-1, 1] -> latents [B,4,h,w] of unit scale
    vae_decoder.onnx             the way back; the VAE's scaling factor is inside both graphs
    kv_slope.onnx                if asked for: latents, timestep, kv [1,S,W], target, for SDXL added -> slope
                                 (`slope.py`), at the base's own size
    unet.plan, vae_decoder.plan  the same for NVIDIA's GPUs, in a bundle made for TensorRT
    tokenizer/                   CLIP's tokenizer

Knows how to read and verify one; does not know how one is made (`export`) or run (`engines`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from safetensors import SafetensorError

from cpserve.base import BaseSpec
from cpserve.errors import EngineError, first_line
from cpserve.manifest import BaseEntry, Document, FileEntry, Fingerprint, Sha256, plain
from cpserve.prompt_kv import KVSites, Site
from cpserve.schedule import Schedule
from cpserve.signature import Signature

SCHEMA = 4
FILE_NAME = "bundle.json"
PROJECTIONS = "kv_projections.safetensors"
TOKENIZER = "tokenizer"
AGAIN = "make it again with cpserve export"
RunnerName = Literal["onnx", "openvino", "trt"]
Precision = Literal["float32", "bfloat16", "float16"]

_Count = Annotated[int, Meta(ge=1)]


class SiteEntry(Document, frozen=True):
    """A K,V site in packing order: the attention module's name and its width C."""

    name: str
    width: _Count


class MergedEntry(Document, frozen=True):
    """A LoRA that was folded into the base's weights: the hash of its file, and how much of it."""

    sha256: Sha256
    scale: float


class Recipe(Document, frozen=True, kw_only=True):
    """Everything that a bundle's files depend on.

    `modules`, `tokenizer` are hashes of configurations and vocabulary, `libraries` the versions that traced it.
    `runner` is whom it was made for, `precision` what the UNet and the decoder are computed in; `rows` are the row counts
    and `sizes` the latent sides that are compiled (none: any), `gpus` the architectures (`sm86`), `slopes` whether the
    error's slope is among the graphs.
    """

    schema_version: Annotated[int, Meta(ge=SCHEMA, le=SCHEMA)] = SCHEMA
    fingerprint: Fingerprint
    modules: Sha256
    tokenizer: Sha256
    merged: tuple[MergedEntry, ...] = ()
    schedule: Mapping[str, Any]
    sites: tuple[SiteEntry, ...]
    text_widths: tuple[_Count, ...]
    pooled: Annotated[int, Meta(ge=0)]
    tokens: _Count
    channels: _Count
    latent_size: _Count
    multiple: _Count
    vae_factor: _Count
    scaling_factor: float
    shift_factor: float
    runner: RunnerName = "onnx"
    precision: Precision = "float32"
    rows: tuple[_Count, ...] = ()
    sizes: tuple[_Count, ...] = ()
    gpus: tuple[str, ...] = ()
    slopes: bool = False
    opset: _Count
    libraries: Mapping[str, str]

    @property
    def key(self) -> str:
        """The bundle's identity: equal recipes, equal keys, whatever folder the base or the bundle lies in."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class BundleManifest(Document, frozen=True):
    """`bundle.json`. `parity` is each graph's largest difference from torch, measured before the bundle was let out."""

    base: str
    commit: str | None
    key: Sha256
    recipe: Recipe
    parity: Mapping[str, float]
    files: tuple[FileEntry, ...]

    def write(self, root: Path) -> None:
        (root / FILE_NAME).write_bytes(self.dump())


class _OlderRecipe(Struct):
    schema_version: Annotated[int, Meta(ge=1, lt=SCHEMA)]


class _Older(Struct):
    """What the manifests of older schemas have in common."""

    recipe: _OlderRecipe
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, eq=False)
class Bundle:
    """A verified bundle; `spec` is what its engines share with the base model that it was made from."""

    root: Path
    manifest: BundleManifest
    spec: BaseSpec

    @cached_property
    def signature(self) -> Signature:
        """What its engines admit."""
        return replace(self.spec.signature, sizes=self.manifest.recipe.sizes or None)

    def graph(self, name: str) -> Path:
        """The ONNX file of a graph, such as `unet`."""
        return self.root / f"{name}.onnx"


def read_manifest(root: Path) -> BundleManifest:
    """What the folder says it is; its files are not looked at.

    Raises:
        EngineError: the folder is no bundle, or its `bundle.json` was changed.
    """
    path = root / FILE_NAME
    try:
        manifest = BundleManifest.read(path.read_bytes())
    except OSError:
        raise EngineError(f"{root} is not an engine bundle: it has no {FILE_NAME}", hint=AGAIN) from None
    except ValueError as error:
        raise EngineError(f"{path} cannot be read: {plain(error)}", hint=AGAIN) from None
    if manifest.recipe.key != manifest.key:
        raise EngineError(f"{path} was changed after the bundle was made", hint=AGAIN)
    return manifest


def files_listed(root: Path) -> tuple[FileEntry, ...]:
    """The files that a bundle of this schema or an older one says it has; they are not looked at.

    Raises:
        EngineError: as `read_manifest`.
    """
    with suppress(OSError, ValueError, RecursionError):
        return msgspec.json.decode((root / FILE_NAME).read_bytes(), type=_Older).files
    return read_manifest(root).files


def read_bundle(root: Path) -> Bundle:
    """Read a bundle and verify every byte of it. Needs neither the base model nor the network.

    Raises:
        EngineError: it is no bundle, or a file is missing or not what it was; the message names the file.
    """
    manifest = read_manifest(root)
    for entry in manifest.files:
        _verify(root, entry)
    needed = {PROJECTIONS, *(f"{name}.onnx" for name in manifest.parity)}
    if manifest.recipe.slopes:
        needed.add("kv_slope.onnx")
    for path in needed - {entry.path for entry in manifest.files}:
        raise EngineError(f"{root / path} is missing from the bundle", hint=AGAIN)
    try:
        return Bundle(root, manifest, _spec(root, manifest))
    except (
        OSError,
        LookupError,
        ValueError,
        TypeError,
        RuntimeError,
        SafetensorError,
    ) as error:  # whole, but nothing that export made
        raise EngineError(f"{root} cannot be read: {first_line(error)}", hint=AGAIN) from error


def file_entry(root: Path, path: Path) -> FileEntry:
    """The entry of a file below `root`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path=path.relative_to(root).as_posix(), size=path.stat().st_size, sha256=digest)


def _verify(root: Path, entry: FileEntry) -> None:
    path = root / entry.path
    try:  # a bundle may come from somebody else: its list of files must not lead out of its folder
        found = path.resolve().is_relative_to(root.resolve()) and path.is_file()
    except (OSError, ValueError):  # too long a name, a NUL in it
        found = False
    if not found:
        raise EngineError(f"{plain(path)} is missing from the bundle", hint=AGAIN)
    if path.stat().st_size != entry.size or file_entry(root, path) != entry:
        raise EngineError(f"{path} is not the file that the bundle was made with", hint=AGAIN)


def _spec(root: Path, manifest: BundleManifest) -> BaseSpec:
    from safetensors.torch import load_file
    from transformers import CLIPTokenizer

    recipe = manifest.recipe
    return BaseSpec(
        entry=BaseEntry(id=manifest.base, fingerprint=recipe.fingerprint, commit=manifest.commit),
        tokenizer=CLIPTokenizer.from_pretrained(root / TOKENIZER, local_files_only=True),
        schedule=Schedule.from_config(dict(recipe.schedule)),
        sites=KVSites(
            tuple(Site(s.name, s.width) for s in recipe.sites),
            load_file(root / PROJECTIONS)["weight"],
            recipe.pooled,
        ),
        text_widths=recipe.text_widths,
        channels=recipe.channels,
        latent_size=recipe.latent_size,
        multiple=recipe.multiple,
        vae_factor=recipe.vae_factor,
        scaling_factor=recipe.scaling_factor,
        shift_factor=recipe.shift_factor,
    )
