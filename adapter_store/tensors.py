"""Tensors of strangers' safetensors as numpy arrays: nothing is believed that was not looked at. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from cpserve.errors import AdapterError
from cpserve.manifest import plain

Array = NDArray[np.float32]
_PLAIN = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def parse_arrays(path: str, content: bytes) -> dict[str, Array]:
    """The tensors of a file as float32, by name.

    Raises:
        AdapterError: it is no safetensors file, or a tensor holds something else than finite numbers.
    """
    try:
        found: list[tuple[str, dict[str, Any]]] = deserialize(content)  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise AdapterError(
            f"{path} is not a safetensors file: {plain(error)}", hint="only .safetensors files are read, whole ones"
        ) from None
    return {name: _array(path, name, tensor) for name, tensor in found}


def _array(path: str, name: str, tensor: Mapping[str, Any]) -> Array:
    kind, data = tensor["dtype"], bytes(tensor["data"])
    raw: NDArray[Any]
    if kind == "BF16":  # the upper half of a float32
        raw = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif kind in _PLAIN:
        raw = np.frombuffer(data, np.dtype(_PLAIN[kind]).newbyteorder("<"))
    else:
        raise AdapterError(f"{path}: {plain(name)} is of type {kind}, not of floating point", hint="take another file")
    with np.errstate(over="ignore"):
        array: Array = raw.astype(np.float32).reshape(tensor["shape"])
    if not np.isfinite(array).all():
        raise AdapterError(
            f"{path}: {plain(name)} holds numbers that are not finite", hint="take another file or version"
        )
    return array
