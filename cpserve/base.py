"""The base model: a diffusers folder, a Hub id, a single safetensors file, or `builtin:emoji64`.

`BaseSpec` is what every engine of a base shares (tokenizer, schedule, K,V projections, sizes); `BaseModel` adds the torch
modules that training and exporting need. The UNet of a `BaseModel` always takes packed K,V (`prompt_kv.pack_unet`).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cpserve.errors import BaseModelError, first_line
from cpserve.manifest import BaseEntry, Fingerprint
from cpserve.prompt_kv import KVSites, PackedUNet, pack_unet
from cpserve.schedule import Schedule
from cpserve.signature import Signature
from cpserve.text_encoder import PIPELINES, TextEncoder
from cpserve.tokens import connect

BUILTIN = "builtin:emoji64"


@dataclass(frozen=True, eq=False)
class BaseSpec:
    """What all engines of one base share.

    `text_widths` are the text encoders' shares of `d`, `vae_factor` is pixels per latent, `latent_size` the default latent side,
    `multiple` divides every latent side.
    """

    entry: BaseEntry
    tokenizer: Any
    schedule: Schedule
    sites: KVSites
    text_widths: tuple[int, ...]
    channels: int
    latent_size: int
    multiple: int
    vae_factor: int
    scaling_factor: float
    shift_factor: float

    @property
    def tokens(self) -> int:
        """S, the length that every prompt is padded to."""
        return int(self.tokenizer.model_max_length)

    @property
    def pixels(self) -> int:
        """The default picture side."""
        return self.latent_size * self.vae_factor

    @property
    def elements(self) -> int:
        """How many numbers the latents of a picture of the default size are."""
        return self.channels * self.latent_size**2

    @property
    def half_decoder(self) -> bool:
        """Whether float16 holds the numbers in the VAE's decoder; those in SDXL's it does not, which diffusers runs in float32."""
        return not self.sites.added

    @cached_property
    def signature(self) -> Signature:
        return Signature(
            self.channels,
            self.sites.packed_width,
            self.tokens,
            multiple=self.multiple,
            added=self.sites.added,
        )

    def sizes(self, latents: Tensor) -> tuple[Tensor, ...]:
        """The row input `added [B,6]` of latents `[B,4,h,w]`, where the UNet takes it: pictures of their own size, uncropped."""
        if not self.sites.added:
            return ()
        *_, h, w = (0, 0, *(side * self.vae_factor for side in latents.shape))  # the signature is checked later
        sizes = torch.tensor([h, w, 0, 0, h, w], dtype=torch.float32, device=latents.device)
        return (sizes.expand(*latents.shape[:1], -1),)


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A base model's torch modules, frozen, in evaluation mode, float32 unless asked otherwise."""

    spec: BaseSpec
    text_encoder: TextEncoder
    unet: PackedUNet
    vae: nn.Module

    def encode_text(self, ids: Tensor, extra: Tensor) -> Tensor:
        """Text states `e [P,S,d+D]` of ids `[P,S]`; ids past the vocabulary are rows of `extra [E,d]` (learned tokens)."""
        return self.text_encoder(ids, extra)  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Latents `[B,4,h,w]` of unit scale of pictures `[B,3,H,W]` in [-1, 1]; the mean, not a draw."""
        latents = self.vae.encode(pictures).latent_dist.mean  # type: ignore[operator]
        return (latents - self.spec.shift_factor) * self.spec.scaling_factor  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures `[B,3,H,W]` in [-1, 1] of latents of unit scale."""
        return self.vae.decode(latents / self.spec.scaling_factor + self.spec.shift_factor).sample  # type: ignore[operator,no-any-return]

    @property
    def device(self) -> torch.device:
        """Where the modules are."""
        return next(self.unet.parameters()).device

    def to(self, device: torch.device) -> BaseModel:
        """The same modules, moved to `device`."""
        for module in (self.text_encoder, self.unet, self.vae):
            module.to(device)
        return self


def load_base(source: str = BUILTIN, *, revision: str | None = None, token_file: Path | None = None) -> BaseModel:
    """Load a base model in float32 on the CPU. Only safetensors are read, never a pickle. The Hub and its token are those of
    `tokens.connect`.

    Raises:
        BaseModelError: there is no such model, a part of it is missing, or it is not Stable-Diffusion-shaped.
    """
    with quiet():
        pipeline, commit = _pipeline(source, revision, token_file)
    text_encoder = TextEncoder.of(pipeline)
    parts = [*text_encoder.encoders, pipeline.unet, pipeline.vae]
    _check(pipeline, source, parts)
    for module in parts:
        module.requires_grad_(requires_grad=False).eval()
    fingerprint = _fingerprint(parts)
    spec = _spec(pipeline, text_encoder, BaseEntry(id=source, fingerprint=fingerprint, commit=commit))
    pack_unet(pipeline.unet, spec.sites)
    return BaseModel(spec, text_encoder, PackedUNet(pipeline.unet), pipeline.vae)


@contextmanager
def quiet() -> Iterator[None]:
    """Loading without the libraries' own progress bars and their remarks on optional parts that are not used here."""
    import diffusers.utils.logging as d
    import transformers.utils.logging as t

    levels = d.get_verbosity(), t.get_verbosity()
    bars = [library for library in (d, t) if library.is_progress_bar_enabled()]
    for library in (d, t):
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():  # diffusers asks the Hub's client in a way that it calls outdated
            warnings.filterwarnings("ignore", module="huggingface_hub")
            yield
    finally:
        d.set_verbosity(levels[0])
        t.set_verbosity(levels[1])
        for library in bars:
            library.enable_progress_bar()


def _pipeline(source: str, revision: str | None, token_file: Path | None) -> tuple[Any, str | None]:
    """diffusers' pipeline, and the commit that it comes from, if it comes from the Hub."""
    from diffusers import DiffusionPipeline

    options: dict[str, Any] = {"dtype": torch.float32, "safety_checker": None}
    where: str | Path = source
    if source == BUILTIN:
        where = Path(str(files("cpserve") / "models" / "emoji64"))
    elif source.endswith((".ckpt", ".pt", ".pth", ".bin")):
        raise BaseModelError(
            f"{source} is a pickle, which can run code when read", hint="use the model's .safetensors file"
        )
    single, beside = str(where).endswith(".safetensors"), Path(where).parent
    # Stable Diffusion's own repositories hold the settings beside the file; else diffusers asks the Hub
    known = single and (beside / "model_index.json").is_file()
    hub: dict[str, Any] = {} if known or Path(where).is_dir() else {"token": connect(token_file=token_file).token}
    try:
        if single:
            options |= {"config": str(beside)} if known else hub
            name = (
                DiffusionPipeline.load_config(str(beside)).get("_class_name", "") if known else _generation(Path(where))
            )
            return _class(name).from_single_file(str(where), **options), None
        options |= {"use_safetensors": True, "requires_safety_checker": False, "feature_extractor": None}
        index, commit = DiffusionPipeline.load_config(str(where), revision=revision, return_commit_hash=True, **hub)
        kind = _class(index.get("_class_name", ""))
        pipeline = kind.from_pretrained(str(where), revision=commit or revision, **options, **hub)
        return pipeline, None if Path(where).is_dir() else commit
    except Exception as error:  # a damaged file or a connection that breaks off has no common kind there
        raise BaseModelError(
            f"the base model {source!r} cannot be loaded: {first_line(error)}",
            hint=f"give {BUILTIN}, a diffusers folder, a Hub id of a Stable Diffusion 1.x, 2.x or XL model, or its "
            ".safetensors file (offline: with the repository's model_index.json and settings beside it)",
        ) from error


def _class(name: str) -> Any:
    """diffusers' class of pipeline, given what a `model_index.json` calls it."""
    import diffusers

    return getattr(diffusers, PIPELINES["XL" in name])


def _generation(checkpoint: Path) -> str:
    """The class of a single file's pipeline: in SDXL's the weights of a second text encoder are."""
    if not checkpoint.is_file():  # an address: diffusers fetches it
        return PIPELINES[0]
    with safe_open(checkpoint, "pt") as file:
        return PIPELINES[any(name.startswith("conditioner.embedders.1.") for name in file.keys())]  # noqa: SIM118


def _check(pipeline: Any, source: str, parts: Iterable[nn.Module]) -> None:
    """Refuse what would be computed wrongly."""
    unet, vae = pipeline.unet.config, pipeline.vae.config
    if not {"beta_schedule", "trained_betas"} & pipeline.scheduler.config.keys() or unet.time_cond_proj_dim is not None:
        raise BaseModelError(
            f"{source} is not trained on a schedule of betas, or takes the guidance as an input",
            hint="use the model that it was distilled from or is like: Stable Diffusion 1.x, 2.x or XL itself",
        )
    if unet.addition_embed_type not in {None, "text_time"} or unet.in_channels != vae.latent_channels:
        raise BaseModelError(
            f"{source} is not a plain text-to-image model of Stable Diffusion 1, 2 or XL",
            hint="inpainting bases are not supported",
        )
    if vae.get("latents_mean") is not None:
        raise BaseModelError(
            f"{source} has latents that are scaled channel by channel",
            hint="use a base whose VAE has one scaling factor",
        )
    if lost := [name for part in parts for name, tensor in part.named_parameters() if tensor.is_meta]:
        raise BaseModelError(f"{source} has no weights for {lost[0]}", hint="fetch or save the model again, whole")


def _spec(pipeline: Any, text_encoder: TextEncoder, entry: BaseEntry) -> BaseSpec:
    unet, vae = pipeline.unet.config, pipeline.vae.config
    sites = KVSites.of(pipeline.unet)
    if (sum(text_encoder.widths), text_encoder.pooled) != (sites.weight.shape[1], sites.pooled):
        raise BaseModelError(
            f"{entry.id} has a UNet that reads other text than its text encoders write", hint="use a base in one piece"
        )
    return BaseSpec(
        entry=entry,
        tokenizer=pipeline.tokenizer,
        schedule=Schedule.from_config(dict(pipeline.scheduler.config)),
        sites=sites,
        text_widths=text_encoder.widths,
        channels=unet.in_channels,
        latent_size=unet.sample_size,
        multiple=2**pipeline.unet.num_upsamplers,
        vae_factor=2 ** (len(vae.block_out_channels) - 1),
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.get("shift_factor") or 0.0,
    )


def _fingerprint(modules: Iterable[nn.Module]) -> Fingerprint:
    """Names and shapes in one hash, weights rounded to fp16 in the other: independent of the precision they are stored in."""
    architecture, weights = hashlib.sha256(), hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            architecture.update(json.dumps([name, list(tensor.shape)]).encode())
            weights.update(tensor.half().contiguous().numpy().tobytes())
    return Fingerprint(architecture=architecture.hexdigest(), weights=weights.hexdigest())
