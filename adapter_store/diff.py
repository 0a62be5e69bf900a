"""What changed from one version to another: concepts, settings, scores, files, and how far each layer moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapter_store.foreign import read_lora
from adapter_store.tensors import Array
from adapter_store.version import Version
from cpserve.errors import AdapterError
from cpserve.manifest import WEIGHTS

Change = tuple[Any, Any]


@dataclass(frozen=True)
class Diff:
    """From one version to another: pairs are (before, after), None where there is none.

    `layers` holds, for every layer that either touches, the Frobenius norm of the difference of their changes `B A` of the
    base's weights, and the norms of both.
    """

    concepts: Mapping[str, Change]
    settings: Mapping[str, Change]
    scores: Mapping[str, Change]
    files: Mapping[str, Change]
    layers: Mapping[str, tuple[float, float, float]]


def diff(before: Version, after: Version) -> Diff:
    """Compare two versions, from anywhere.

    Raises:
        AdapterError: weights are no LoRA, or the two were learned on bases of other shapes.
        IntegrityError: weights are damaged.
        StoreError: weights are not here.
    """
    old, new = before.manifest, after.manifest
    settings = [{"base": m.base.id, "method": m.method, "layers": m.layers, **m.settings} for m in (old, new)]
    return Diff(
        concepts=_changes(*({c.name: c.token for c in m.concepts} for m in (old, new))),
        settings=_changes(*settings),
        scores=_changes(old.metrics, new.metrics),
        files=_changes(*({f.path: f.sha256 for f in m.files} for m in (old, new))),
        layers=_moves(before, after),
    )


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Change]:
    return {k: (old.get(k), new.get(k)) for k in sorted({*old, *new}) if old.get(k) != new.get(k)}


def _factors(version: Version) -> Mapping[str, tuple[Array, Array]]:
    """By layer, the factors `A [r,d]` and `B [C,r]`."""
    return read_lora(f"{version}: {WEIGHTS}", version.read(WEIGHTS)).modules if WEIGHTS in version.paths() else {}


def _moves(before: Version, after: Version) -> dict[str, tuple[float, float, float]]:
    moves, old, new = {}, _factors(before), _factors(after)
    for layer in sorted({*old, *new}):
        pairs = [each for each in (old.get(layer), new.get(layer)) if each]
        if len({(a.shape[1:], len(b)) for a, b in pairs}) > 1:
            raise AdapterError(
                f"{before} and {after} were learned on bases of other shapes", hint="compare versions of one adapter"
            )
        same = len(pairs) == 2 and all(np.array_equal(x, y) for x, y in zip(*pairs, strict=True))
        signed = [(a, -b if each is old.get(layer) else b) for each in pairs for a, b in [each]]
        norms = [product_norm([each[layer]]) if layer in each else 0.0 for each in (old, new)]
        moves[layer] = (0.0 if same else product_norm(signed), *norms)
    return moves  # type: ignore[return-value]


def product_norm(factors: list[tuple[Array, Array]]) -> float:
    """The Frobenius norm of the sum of `B A`, without ever making the sum: of the triangles that both factors reduce to."""
    a = np.concatenate([a.reshape(len(a), -1) for a, _ in factors]).astype(np.float64)
    b = np.concatenate([b.reshape(len(b), -1) for _, b in factors], axis=1).astype(np.float64)
    upper_b, upper_a = (np.asarray(np.linalg.qr(matrix, "r")) for matrix in (b, a.T))
    return float(np.linalg.norm(upper_b @ upper_a.T))
