"""Versions without meaning, of the shape that real ones have."""

from __future__ import annotations

import random

from adapter_store import Store, Version
from cpserve.manifest import BaseEntry, ConceptEntry, Fingerprint, Manifest, Parent

BASE = BaseEntry(id="builtin:emoji64", fingerprint=Fingerprint(architecture="0" * 64, weights="1" * 64))
NAMES = ("dog", "cat", "cow", "hen")


def draft(number: int, trained_from: Parent | None = None) -> Manifest:
    """What a trainer knows of version N, in which the Nth concept was learned."""
    concepts = tuple(
        ConceptEntry(name=name, token=f"<{name}>", class_word=None, templates=("a {}",), since=i + 1, pictures=6)
        for i, name in enumerate(NAMES[:number])
    )
    return Manifest(base=BASE, concepts=concepts, method="ewc", trained_from=trained_from)


def files_of(number: int, size: int = 20_000) -> dict[str, bytes]:
    """Version N's files: large ones, small ones, some that never change."""
    noise = random.Random(number).randbytes
    return {
        "README.md": b"---\nlicense: mit\n---\n# version %d\n" % number,
        "pytorch_lora_weights.safetensors": noise(size),
        **{f"embeddings/{name}.safetensors": name.encode() * 100 for name in NAMES[:number]},
        "training/fisher.safetensors": noise(size // 2),
        "samples/dog-0.png": noise(300),
    }


def learn(store: Store, name: str = "pets", count: int = 1) -> Version:
    """Store the next versions, each trained from the one before."""
    for _ in range(count):
        head = store.head(name)
        pin = store.version(name).pin if head else None
        version = store.commit(name, files_of(head + 1), draft(head + 1, pin), expected_head=head)
    return version
