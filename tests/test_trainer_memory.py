"""Training where memory is short, and on a device of its own: what is computed stays what it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from cpserve.adapter import Adapter, empty_adapter
from cpserve.base import BaseModel
from tests.lessons import QUICK, concept, learned
from trainer import Settings
from trainer.images import encode_concept
from trainer.loop import Task, prepare
from trainer.sequence import Lesson, _penalty, _task, check_new


def lesson_of(base: BaseModel, start: Adapter, settings: Settings = QUICK) -> Lesson:
    return Lesson(base, start.to(base.device), check_new(base, start, concept("cat")), (None,) * 3, settings)


def task_of(base: BaseModel, settings: Settings = QUICK) -> Task:
    latents = {"latents": encode_concept(base, concept("cat"), settings.variants, 0)}
    return _task(lesson_of(base, empty_adapter(base.spec.entry), settings), latents)


def gradients(task: Task) -> tuple[torch.Tensor, int]:
    """Of one step in one vector, and the bytes of activations that the way back kept of the way there."""
    weights = {p.untyped_storage().data_ptr() for p in task.base.unet.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    leaves = [task.trainable.token, *task.trainable.factors.values()]
    total = torch.zeros(sum(leaf.numel() for leaf in leaves))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = [*task.losses(0)]
    for loss in losses:
        total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
    return total, sum(storage.nbytes() for at, storage in kept.items() if at not in weights)


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.loop.faster_precision", lambda _: nullcontext())


@pytest.fixture
def checkpointed(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[BaseModel]:
    """The base, as if it were a big one."""
    monkeypatch.setattr("trainer.loop.BIG", 0)
    prepare(base)
    yield base
    base.unet.unet.disable_gradient_checkpointing()


def test_a_step_in_parts_is_the_whole_step(base: BaseModel) -> None:
    """However many parts a step's rows are run in, its gradients are the same to what its sums round to."""
    whole, _ = gradients(task_of(base))
    for parts in (2, 3, 4):
        split, _ = gradients(task_of(base, replace(QUICK, accumulate=parts)))
        assert float((split - whole).norm() / whole.norm()) < 1e-3


def test_a_big_base_keeps_less_for_the_way_back(base: BaseModel, checkpointed: BaseModel) -> None:
    """With activations computed again a step's gradients are the same bit for bit, and less than half of the bytes are kept."""
    again, little = gradients(task_of(checkpointed))
    base.unet.unet.disable_gradient_checkpointing()
    once, much = gradients(task_of(base))
    assert torch.equal(again, once)
    assert little < much / 2


def test_everything_is_on_the_bases_device(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With the base on another device, here torch's "meta", a step and its penalty run there from end to end."""
    settings = replace(QUICK, method="c-lora")
    start = learned(base, tmp_path_factory.mktemp("start"), settings, "dog")
    latents = {"latents": encode_concept(base, concept("cat"), settings.variants, 0)}
    parts = {name: copy.deepcopy(getattr(base, name)) for name in ("text_encoder", "unet", "vae")}
    elsewhere = replace(base, **parts).to(torch.device("meta"))
    lesson = lesson_of(elsewhere, start, settings)
    task = _task(lesson, latents)
    penalty = _penalty(lesson, task.trainable)
    assert penalty
    leaves = {"token": task.trainable.token, **task.trainable.factors}
    for loss in (*task.losses(0), penalty(leaves)):
        assert loss.device.type == "meta"
        loss.backward()
    assert {leaf.grad.device.type for leaf in leaves.values() if leaf.grad is not None} == {"meta"}
