"""Which token goes to which Hub.

The token that `hf auth login` stored goes to https://huggingface.co and nowhere else; one that the user names, by
`HF_TOKEN` or a file, goes to the Hub that the user names. None goes over plain http, except to this machine itself.
Tokens never come from the command line, are never saved and never printed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from cpserve.errors import StoreError

HUGGING_FACE = "https://huggingface.co"


@dataclass(frozen=True)
class Connection:
    """Where the Hub is, and the token for it; False sends none."""

    endpoint: str
    token: str | Literal[False] = field(default=False, repr=False)


def connect(
    endpoint: str | None = None, token_file: Path | None = None, environment: Mapping[str, str] = os.environ
) -> Connection:
    """The Hub that `endpoint`, else `HF_ENDPOINT`, names, else Hugging Face's, with the token that may go there.

    Raises:
        StoreError: the address is none, the token file cannot be read, or the token would travel in the clear.
    """
    where = address(endpoint, environment)
    named = _read(token_file) if token_file else environment.get("HF_TOKEN", "").strip()
    if named and not _private_way(where):
        raise StoreError(
            f"a token is not sent to {where}: without https anybody on the way can read it",
            hint=f"use an https address, or {'leave out --token-file' if token_file else 'unset HF_TOKEN'}",
        )
    return Connection(where, named or _stored(where, environment))


def address(endpoint: str | None = None, environment: Mapping[str, str] = os.environ) -> str:
    """The Hub that `endpoint`, else `HF_ENDPOINT`, names, else Hugging Face's.

    Raises:
        StoreError: the address is none.
    """
    where = (endpoint or environment.get("HF_ENDPOINT") or HUGGING_FACE).rstrip("/")
    if not _is_address(where):
        raise StoreError(f"{where!r} is no address of a Hub", hint=f"write it as {HUGGING_FACE}")
    return where


def _is_address(where: str) -> bool:
    try:
        parts = urlsplit(where)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError:  # half an IPv6 address, a port that is no number
        return False


def _read(path: Path) -> str:
    try:
        token = path.read_text("utf-8").strip()
    except (OSError, ValueError):
        token = ""
    if not token:
        raise StoreError(f"{path} holds no token", hint="put the token alone into the file")
    return token


def _private_way(endpoint: str) -> bool:
    parts = urlsplit(endpoint)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def _stored(endpoint: str, environment: Mapping[str, str]) -> str | Literal[False]:
    if endpoint != HUGGING_FACE or environment.get("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return False
    from huggingface_hub import get_token

    return get_token() or False
