"""Readying the real huggingface_hub for the test Hub: online, without Xet, an empty cache, no waiting between tries."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hubserver.app import OWNER_TOKEN, HubServer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub without repositories, and the client set to it, with the token of `me`."""
    ready(tmp_path / "cache", monkeypatch)
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def ready(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads its environment when it is imported; here it is told again."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http, disable_progress_bars

    from adapter_store import hub_client

    disable_progress_bars()
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN_PATH": str(cache / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    hasty = SimpleNamespace(sleep=lambda _: None, time=time.time, monotonic=time.monotonic)
    for module in (_http, file_download, hub_client):
        monkeypatch.setattr(module, "time", hasty)


def environment(hub: HubServer, cache: Path) -> dict[str, str]:
    """The same for another process."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": OWNER_TOKEN,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
