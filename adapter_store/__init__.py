"""Adapters by name and version, kept as bytes and manifests; no tensors here."""

from adapter_store.store import Problem, Ref, Store, Version

__all__ = ["Problem", "Ref", "Store", "Version"]
