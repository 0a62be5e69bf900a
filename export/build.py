"""Base model in, engine bundle out: planned first, checked against torch before it appears, renamed into place."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from glob import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import msgspec
from filelock import FileLock, Timeout
from safetensors.torch import save

from cpserve.base import BaseModel
from cpserve.bundle import (
    FILE_NAME,
    PROJECTIONS,
    TOKENIZER,
    Bundle,
    BundleManifest,
    Precision,
    Recipe,
    SiteEntry,
    file_entry,
    files_listed,
    read_bundle,
    read_manifest,
)
from cpserve.engine import open_engine
from cpserve.engines.eager import EagerEngine
from cpserve.engines.trt import PLANS, load_tensorrt
from cpserve.errors import EngineError
from export.merged import Lora, merge
from export.onnx_from_unet import OPSET, graphs, write_graph
from export.parity import check_parity
from export.plan_from_onnx import profiles, write_plan
from export.target import Target, resolve

LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
LOCK = "building.lock"
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

    @property
    def seconds(self) -> int:
        """About how long building takes on two CPU cores: tracing costs the same whatever the width, the rest goes by weights."""
        tracing = 25 + 85 * self.recipe.slopes
        return 0 if self.action == "up to date" else tracing + 25 * self.bytes // (1 << 30)

    def execute(self, progress: Progress | None = None) -> Bundle:
        """Do it; `progress` is told what begins.

        Raises:
            EngineError: the compiled graphs differ from torch. `out` is then as it was.
        """
        if self.action == "up to date":
            return read_bundle(self.out)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with _beside(self.out) as beside:
            made = beside / "bundle"
            bundle = _build(self, made, progress or (lambda _: None))
            # the old one steps aside, the new one steps in; only then is the old one deleted, with the folder beside
            if self.out.exists():
                self.out.rename(beside / "old")
            made.rename(self.out)
        return replace(bundle, root=self.out)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder to build in, on the disk of `out`; what is left in it goes away, and so do those that killed exports left.

    The lock in a folder tells whether its export lives.
    """
    prefix = f".{out.name}."
    for lock in out.parent.glob(f"{escape(prefix)}*/{LOCK}"):
        with suppress(Timeout), FileLock(lock, blocking=False):
            shutil.rmtree(lock.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as beside, FileLock(Path(beside) / LOCK):
        yield Path(beside)


def export_onnx(base: BaseModel, out: Path, *, progress: Progress | None = None) -> Bundle:
    """Compile a base once, for every adapter, for ONNX Runtime. Returns at once if `out` holds the same bundle already.

    Raises:
        EngineError: `out` holds something else, a library is missing, or the graphs differ from torch.
    """
    return plan_export(base, out).execute(progress)


def plan_export(base: BaseModel, out: Path, target: Target | None = None, loras: Sequence[Lora] = ()) -> Plan:
    """What compiling `base` for `target` (ONNX Runtime where None) would do, with `loras` folded in; nothing is written.

    Raises:
        EngineError: `out` holds something other than a bundle, a library is missing, or the target cannot be had here.
        AdapterError: a LoRA cannot be read or does not fit the base.
    """
    target = resolve(target or Target(), base)
    recipe = msgspec.structs.replace(_recipe(base, target), merged=tuple(lora.entry() for lora in loras))
    base = merge(base, loras)
    return Plan(base, out, recipe, _action(out, recipe), _files(base, recipe))


def _action(out: Path, recipe: Recipe) -> Literal["build", "replace", "up to date"]:
    if not out.name or out.is_mount():
        raise EngineError(f"{out} cannot be replaced as a whole", hint=f"name a folder in it: --out {out / 'bundle'}")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return "build"
    refusal = EngineError(
        f"{out} holds something other than an engine bundle, and is left alone",
        hint="choose another --out, or delete it",
    )
    try:
        known = {FILE_NAME, *(entry.path for entry in files_listed(out))}
    except EngineError:
        raise refusal from None
    if any(p.relative_to(out).as_posix() not in known for p in out.rglob("*") if not p.is_dir()):
        raise refusal
    with suppress(EngineError):
        if read_manifest(out).key == recipe.key and read_bundle(out):
            return "up to date"
    return "replace"


def _files(base: BaseModel, recipe: Recipe) -> tuple[PlannedFile, ...]:
    projections = 4 * base.spec.sites.weight.numel()
    parts = graphs(base, slopes=recipe.slopes)
    sizes = {g.name: 4 * sum(p.numel() for p in g.module.parameters()) for g in parts}
    sizes |= {name: sizes[name] - projections for name in ("unet", "kv_slope") if name in sizes}
    plans = (
        {"unet": 4 << 20, "vae_decoder": 1 << 20} if recipe.runner == "trt" else {}
    )  # bytes of kernels a profile and GPU
    kernels = len(recipe.rows) * len(recipe.sizes) * len(recipe.gpus)
    if recipe.runner != "openvino" and recipe.precision == "float16":  # OpenVINO lowers what it loads
        sizes |= {name: sizes[name] // 2 for name in PLANS[: 1 + base.spec.half_decoder]}
    return (
        *(PlannedFile(f"{g.name}.onnx", sizes[g.name], g.what) for g in parts),
        *(
            PlannedFile(f"{n}.plan", sizes[n] + kernels * k, f"the same for {', '.join(recipe.gpus)}")
            for n, k in plans.items()
        ),
        PlannedFile(PROJECTIONS, projections, "the frozen K,V projections that adapters add to"),
        PlannedFile(f"{TOKENIZER}/", 64 * len(base.spec.tokenizer), "the tokenizer"),
        PlannedFile(FILE_NAME, 8192, "what the bundle is, and the hash of every file"),
    )


def _recipe(base: BaseModel, target: Target) -> Recipe:
    spec, text = base.spec, base.text_encoder
    return Recipe(
        fingerprint=spec.entry.fingerprint,
        modules=_hash([_settings(m) for m in (base.unet.unet, text, *text.encoders, base.vae)]),
        tokenizer=_hash(_vocabulary(spec.tokenizer)),
        schedule=_in_order(spec.schedule.config),
        sites=tuple(SiteEntry(name=s.name, width=s.width) for s in spec.sites.sites),
        text_widths=spec.text_widths,
        pooled=spec.sites.pooled,
        tokens=spec.tokens,
        channels=spec.channels,
        latent_size=spec.latent_size,
        multiple=spec.multiple,
        vae_factor=spec.vae_factor,
        scaling_factor=spec.scaling_factor,
        shift_factor=spec.shift_factor,
        runner=target.runner,
        precision=target.precision or "float32",
        rows=target.rows,
        sizes=tuple(side // spec.vae_factor for side in target.sizes),
        gpus=target.gpus,
        slopes=target.slopes,
        opset=OPSET,
        libraries={name: _version(name) for name in LIBRARIES} | _tensorrt(target),
    )


def _in_order(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's configuration with lists that diffusers makes of sets, in an order of chance, sorted."""
    defaults = schedule.get("_use_default_values")
    return {**schedule, **({"_use_default_values": sorted(defaults)} if defaults else {})}


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


def _tensorrt(target: Target) -> dict[str, str]:
    if target.runner != "trt":
        return {}
    trt = load_tensorrt()
    return {trt.__name__.removesuffix("_bindings"): trt.__version__}


def _build(plan: Plan, root: Path, progress: Progress) -> Bundle:
    spec, recipe = plan.base.spec, plan.recipe
    root.mkdir()
    precision: Precision = "float32" if recipe.runner == "openvino" else recipe.precision
    for graph in graphs(plan.base, precision, slopes=recipe.slopes):
        progress(f"compiling {graph.what}")
        write_graph(graph, root)
    (root / PROJECTIONS).write_bytes(save({"weight": spec.sites.weight.cpu().contiguous()}))
    spec.tokenizer.save_pretrained(root / TOKENIZER)
    _manifest(plan, root, {})
    progress("comparing with torch")
    # a plan cannot run on every machine that builds it: the very graphs that it is built from are compared in its place
    runner = "onnx" if recipe.runner == "trt" else "auto"
    with EagerEngine(plan.base) as torch_engine, open_engine(engine=runner, bundle=root) as engine:
        parity = check_parity(torch_engine, engine, recipe.precision)
        spec = engine.spec
    for name in PLANS if recipe.runner == "trt" else ():
        progress(f"building a plan of {name}.onnx for {', '.join(recipe.gpus)}")
        wanted = profiles(name, spec.signature, recipe.rows, recipe.sizes)
        write_plan(root / f"{name}.onnx", root / f"{name}.plan", wanted, recipe.gpus)
    return Bundle(root, _manifest(plan, root, parity), spec)


def _manifest(plan: Plan, root: Path, parity: dict[str, float]) -> BundleManifest:
    """Write down what lies in `root`."""
    found = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name != FILE_NAME)
    entry = plan.base.spec.entry
    manifest = BundleManifest(
        base=entry.id,
        commit=entry.commit,
        key=plan.recipe.key,
        recipe=plan.recipe,
        parity=parity,
        files=tuple(file_entry(root, path) for path in found),
    )
    manifest.write(root)
    return manifest
