"""Base model in, engine bundle out: planned first, checked against torch before it appears, renamed into place."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save

from cpserve.base import BaseModel
from cpserve.bundle import (
    FILE_NAME,
    PROJECTIONS,
    TOKENIZER,
    Bundle,
    BundleManifest,
    Recipe,
    SiteEntry,
    file_entry,
    read_bundle,
    read_manifest,
)
from cpserve.engines.eager import EagerEngine
from cpserve.engines.ort import OrtEngine
from cpserve.errors import EngineError
from export.onnx_from_unet import OPSET, graphs, write_graph
from export.parity import check_parity

LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class PlannedFile:
    """A file of the bundle, about how large, and what it is."""

    name: str
    bytes: int
    what: str


@dataclass(frozen=True, eq=False)
class Plan:
    """What an export would do to `out`; `execute` does it."""

    base: BaseModel
    out: Path
    recipe: Recipe
    action: Literal["build", "replace", "up to date"]
    files: tuple[PlannedFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def execute(self, progress: Progress | None = None) -> Bundle:
        """Do it; `progress` is told what begins.

        Raises:
            EngineError: the compiled graphs differ from torch. `out` is then as it was.
        """
        if self.action == "up to date":
            return read_bundle(self.out)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.out.name}.", dir=self.out.parent) as beside:
            made = Path(beside) / "bundle"
            bundle = _build(self, made, progress or (lambda _: None))
            # the old one steps aside, the new one steps in; only then is the old one deleted, with the folder beside
            if self.out.exists():
                self.out.rename(Path(beside) / "old")
            made.rename(self.out)
        return replace(bundle, root=self.out)


def export_onnx(base: BaseModel, out: Path, *, progress: Progress | None = None) -> Bundle:
    """Compile a base once, for every adapter. Returns at once if `out` holds the same bundle already.

    Raises:
        EngineError: `out` holds something else, a library is missing, or the graphs differ from torch.
    """
    return plan_export(base, out).execute(progress)


def plan_export(base: BaseModel, out: Path) -> Plan:
    """What `export_onnx` would do; nothing is written.

    Raises:
        EngineError: `out` holds something other than a bundle, or a library is missing.
    """
    recipe = _recipe(base)
    return Plan(base, out, recipe, _action(out, recipe), _files(base))


def _action(out: Path, recipe: Recipe) -> Literal["build", "replace", "up to date"]:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return "build"
    refusal = EngineError(
        f"{out} holds something other than an engine bundle, and is left alone",
        hint="choose another --out, or delete it",
    )
    try:
        manifest = read_manifest(out)
    except EngineError:
        raise refusal from None
    known = {FILE_NAME, *(entry.path for entry in manifest.files)}
    if any(p.relative_to(out).as_posix() not in known for p in out.rglob("*") if not p.is_dir()):
        raise refusal
    if manifest.key != recipe.key:
        return "replace"
    try:
        read_bundle(out)
    except EngineError:
        return "replace"
    return "up to date"


def _files(base: BaseModel) -> tuple[PlannedFile, ...]:
    projections = 4 * base.spec.sites.weight.numel()
    sizes = {g.name: 4 * sum(p.numel() for p in g.module.parameters()) for g in graphs(base)}
    sizes["unet"] -= projections
    return (
        *(PlannedFile(f"{g.name}.onnx", sizes[g.name], g.what) for g in graphs(base)),
        PlannedFile(PROJECTIONS, projections, "the frozen K,V projections that adapters add to"),
        PlannedFile(f"{TOKENIZER}/", 64 * len(base.spec.tokenizer), "the tokenizer"),
        PlannedFile(FILE_NAME, 8192, "what the bundle is, and the hash of every file"),
    )


def _recipe(base: BaseModel) -> Recipe:
    spec = base.spec
    return Recipe(
        fingerprint=spec.entry.fingerprint,
        modules=_hash([_settings(m) for m in (base.unet.unet, base.text_encoder, base.vae)]),
        tokenizer=_hash(_vocabulary(spec.tokenizer)),
        schedule=spec.schedule.config,
        sites=tuple(SiteEntry(name=s.name, width=s.width) for s in spec.sites.sites),
        tokens=spec.tokens,
        channels=spec.channels,
        latent_size=spec.latent_size,
        multiple=spec.multiple,
        vae_factor=spec.vae_factor,
        scaling_factor=spec.scaling_factor,
        shift_factor=spec.shift_factor,
        opset=OPSET,
        libraries={name: _version(name) for name in LIBRARIES},
    )


def _settings(module: Any) -> dict[str, Any]:
    """A module's configuration without the entries that say where it was loaded from."""
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _vocabulary(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's definition without the padding that its last call left in it."""
    return json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}  # type: ignore[no-any-return]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        raise EngineError(
            f"exporting needs {library}, which is not installed", hint="pip install 'cpserve[cpu]'"
        ) from None


def _build(plan: Plan, root: Path, progress: Progress) -> Bundle:
    spec = plan.base.spec
    root.mkdir()
    for graph in graphs(plan.base):
        progress(f"compiling {graph.what}")
        write_graph(graph, root)
    (root / PROJECTIONS).write_bytes(save({"weight": spec.sites.weight.cpu().contiguous()}))
    spec.tokenizer.save_pretrained(root / TOKENIZER)
    entries = tuple(file_entry(root, path) for path in sorted(root.rglob("*")) if path.is_file())
    manifest = BundleManifest(
        base=spec.entry.id, commit=spec.entry.commit, key=plan.recipe.key, recipe=plan.recipe, parity={}, files=entries
    )
    manifest.write(root)
    progress("comparing with torch")
    with EagerEngine(plan.base) as torch_engine, OrtEngine(root) as engine:
        measured = manifest.model_copy(update={"parity": check_parity(torch_engine, engine)})
        measured.write(root)
        return replace(engine.bundle, manifest=measured)
