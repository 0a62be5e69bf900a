"""Two tiny base models on disk, built once a session, loaded by `cpserve` and, apart from it, by plain diffusers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported: no test may reach the network

import pytest
import torch

from cpserve.base import BaseModel, load_base
from cpserve.engines.eager import EagerEngine
from export.build import export_onnx
from tests.tiny import SHAPES, write_pipeline


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The diffusers folders, `sd15` and `sd21`."""
    root = tmp_path_factory.mktemp("bases")
    return {name: write_pipeline(root / name, shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="session")
def bases(folders: dict[str, Path]) -> dict[str, BaseModel]:
    """The folders as `cpserve` loads them."""
    return {name: load_base(str(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="session", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    """Each test that takes it runs on both generations."""
    return request.param


@pytest.fixture(scope="session")
def base(bases: dict[str, BaseModel], shape: str) -> BaseModel:
    return bases[shape]


@pytest.fixture(scope="session")
def bundles(bases: dict[str, BaseModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bases as engine bundles; tests copy one before they change it."""
    root = tmp_path_factory.mktemp("bundles")
    return {name: export_onnx(base, root / name).root for name, base in bases.items()}


@pytest.fixture
def eager(base: BaseModel) -> Iterator[EagerEngine]:
    with EagerEngine(base) as engine:
        yield engine
