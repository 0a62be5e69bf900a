"""An adapter: everything learned so far, as named tensors and a manifest, and the files that plain diffusers reads.

Does not know where versions are kept (`adapter_store`) or how they are learned (`trainer`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cpserve.errors import AdapterError
from cpserve.lora_header import lora_header
from cpserve.manifest import EMBEDDINGS, NEWEST_EMBEDDING, SAMPLES, TRAINING, WEIGHTS, BaseEntry, Manifest, plain

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Adapter:
    """`lora` holds diffusers' K,V factors (alpha == r, the scale folded into B), `embeddings` one vector `[d]` a token,
    `training` what the next concept's training needs, `samples` pictures as PNG bytes by file name. `text_widths` are the
    text encoders' shares of a vector, where there are several.
    """

    manifest: Manifest
    lora: Tensors
    embeddings: Tensors
    training: Mapping[str, Tensors] = field(default_factory=dict)
    samples: Mapping[str, bytes] = field(default_factory=dict)
    text_widths: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[str]:
        """The learned tokens in the order in which they were learned."""
        return [concept.token for concept in self.manifest.concepts]

    @cached_property
    def content_hash(self) -> str:
        """A hash of everything that K,V depend on; caches are keyed by it, never by a name or an address."""
        digest = hashlib.sha256(json.dumps(self.tokens).encode())
        for group in (self.lora, self.embeddings):
            for name in sorted(group):
                tensor = group[name].detach().float().cpu().contiguous()
                digest.update(json.dumps([name, list(tensor.shape)]).encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def extra_rows(self, width: int) -> Tensor:
        """The learned tokens' embeddings `[E,d]` float32, in `tokens`' order.

        Raises:
            AdapterError: one is missing, has another width than `d`, or holds a number that is not finite.
        """
        rows = torch.zeros(len(self.tokens), width)
        for i, token in enumerate(self.tokens):
            row = self.embeddings.get(token)
            if row is None or row.shape != (width,) or not torch.isfinite(row).all():
                raise AdapterError(
                    f"the adapter has no sound embedding of {width} numbers for {token}",
                    hint="use the base model that the adapter was learned on, or run: cpserve adapters verify",
                )
            rows[i] = row
        return rows

    def to(self, device: torch.device) -> Adapter:
        """The same factors, and what training needs, on `device`; embeddings stay on the CPU, where `extra_rows` joins them."""
        training = {name: _moved(group, device) for name, group in self.training.items()}
        return replace(self, lora=_moved(self.lora, device), training=training)

    def files(self) -> dict[str, bytes]:
        """The version as files (without manifest and card), in the layout that plain diffusers loads."""
        made = {WEIGHTS: save(_ready(self.lora), metadata=lora_header(_ranks(self.lora)))}
        for concept in self.manifest.concepts:
            whole = self.embeddings[concept.token]
            for folder, part in zip(EMBEDDINGS, whole.split(list(self.text_widths) or len(whole)), strict=False):
                made[f"{folder}/{concept.name}.safetensors"] = save({concept.token: part.contiguous()})
            made[NEWEST_EMBEDDING] = made[f"{EMBEDDINGS[0]}/{concept.name}.safetensors"]
        made |= {f"{TRAINING}/{name}.safetensors": save(_ready(tensors)) for name, tensors in self.training.items()}
        return made | {f"{SAMPLES}/{name}": png for name, png in self.samples.items()}

    @classmethod
    def read(cls, manifest: Manifest, read: Callable[[str], bytes], *, for_training: bool = False) -> Adapter:
        """From a stored version; `read` gives a file's verified bytes.

        Raises:
            AdapterError: a file is not what the manifest says.
        """
        lora = parse_tensors(WEIGHTS, read(WEIGHTS))
        paths = [entry.path for entry in manifest.files]
        embeddings: dict[str, Tensor] = {}
        widths: tuple[int, ...] = ()
        for concept in manifest.concepts:
            first, second = (f"{folder}/{concept.name}.safetensors" for folder in EMBEDDINGS)
            parts = [_embedding(p, read(p), concept.token) for p in (first, *({second} & set(paths)))]
            embeddings[concept.token], widths = torch.cat(parts), tuple(map(len, parts))
        folder = f"{TRAINING}/"
        training = {p.removeprefix(folder).removesuffix(".safetensors"): p for p in paths if p.startswith(folder)}
        kept = {name: parse_tensors(p, read(p)) for name, p in training.items()} if for_training else {}
        return cls(manifest, lora, embeddings, kept, text_widths=widths)


def empty_adapter(base: BaseEntry, method: str = "none") -> Adapter:
    """What a sequence of concepts begins with."""
    return Adapter(Manifest(base=base, concepts=(), method=method), {}, {})


def check_fits(manifest: Manifest, base: BaseEntry) -> str | None:
    """A warning if an adapter was learned on other weights of the same architecture, else None.

    Raises:
        AdapterError: it was learned on another architecture.
    """
    learned = manifest.base
    if learned.fingerprint.architecture != base.fingerprint.architecture:
        raise AdapterError(
            f"the adapter was learned on {learned.id}, which has another architecture than {base.id}",
            hint=f"use --base {learned.id}, or another adapter; generate draws without one under --no-adapter",
        )
    if learned.fingerprint.weights != base.fingerprint.weights:
        return f"the adapter was learned on {learned.id}; the weights of {base.id} differ, so pictures will too"
    return None


def parse_tensors(path: str, content: bytes) -> dict[str, Tensor]:
    """The tensors of untrusted safetensors bytes.

    Raises:
        AdapterError: the bytes are no safetensors file, or hold numbers that are not finite.
    """
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        why = f"{path} is not a safetensors file: {plain(error)}"
        raise AdapterError(why, hint="run: cpserve adapters verify") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or not torch.isfinite(tensor).all():
            why = f"{path}: {plain(name)} holds something else than finite numbers"
            raise AdapterError(why, hint="take another version")
    return tensors


def _embedding(path: str, content: bytes, token: str) -> Tensor:
    found = parse_tensors(path, content)
    if set(found) != {token} or found[token].ndim != 1:
        raise AdapterError(f"{path} does not hold the token {token}", hint="run: cpserve adapters verify")
    return found[token]


def _ranks(lora: Tensors) -> dict[str, int]:
    end = ".lora_A.weight"
    return {name.removesuffix(end): len(tensor) for name, tensor in lora.items() if name.endswith(end)}


def _moved(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _ready(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
