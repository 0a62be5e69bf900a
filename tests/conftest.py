"""Tiny base models on disk, built once for all of pytest's processes, loaded by `cpserve` and, apart from it, by diffusers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported: no test may reach the network

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from cpserve.base import BaseModel, load_base
from cpserve.engines.eager import EagerEngine
from export.build import export_onnx
from tests.tiny import SHAPES, write_pipeline

settings.register_profile("laws", derandomize=True, deadline=None)  # the same examples everywhere, on slow machines too
settings.load_profile("laws")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """A folder that the first of pytest's processes to need it builds, and the others wait for."""
    run = factory.getbasetemp()
    root = run.parent if "PYTEST_XDIST_WORKER" in os.environ else run
    with FileLock(root / f"{name}.lock"):
        if not (root / f"{name}.built").exists():
            build(root / name)
            (root / f"{name}.built").touch()
    return root / name


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The diffusers folders, `sd15`, `sd21` and `sdxl`."""

    def built(name: str) -> Path:
        return once(tmp_path_factory, f"base-{name}", lambda folder: write_pipeline(folder, SHAPES[name]))

    return {name: built(name) for name in SHAPES}


@pytest.fixture(scope="session")
def bases(folders: dict[str, Path]) -> dict[str, BaseModel]:
    """The folders as `cpserve` loads them."""
    return {name: load_base(str(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="session", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    """Each test that takes it runs on every generation."""
    return request.param


@pytest.fixture(scope="session")
def base(bases: dict[str, BaseModel], shape: str) -> BaseModel:
    return bases[shape]


@pytest.fixture(scope="session")
def bundles(bases: dict[str, BaseModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bases as engine bundles, each made when it is first asked for; tests copy one before they change it."""

    class Bundles(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = once(tmp_path_factory, f"bundle-{name}", lambda folder: export_onnx(bases[name], folder))
            return self[name]

    return Bundles()


@pytest.fixture
def eager(base: BaseModel) -> Iterator[EagerEngine]:
    with EagerEngine(base) as engine:
        yield engine
