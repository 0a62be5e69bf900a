"""Laws of what holds earlier concepts in place, and of what is learned under."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cpserve.adapter import Adapter, empty_adapter
from cpserve.base import BaseModel
from cpserve.concept import Concept, Picture
from cpserve.errors import TrainingError
from tests.lessons import QUICK, concept, learned, packed_of
from trainer import METHODS, Progress, Record, learn
from trainer.consolidate import consolidation
from trainer.images import encode_concept
from trainer.lora import fresh_factors
from trainer.penalties.c_lora import Overlap, updates
from trainer.penalties.null_space import largest_change
from trainer.sequence import Lesson, _task, check_new


@pytest.fixture(scope="session")
def base(bases: dict[str, BaseModel]) -> BaseModel:
    return bases["sd15"]


@pytest.fixture(scope="session")
def v_base(bases: dict[str, BaseModel]) -> BaseModel:
    return bases["sd21"]


def test_c_loras_penalty_is_the_squared_norm_of_the_overlap(base: BaseModel) -> None:
    """It is lambda sum (|dW_past| dW_new)^2 over all projections, and zero where the two touch different elements."""
    sites, generator = base.spec.sites, torch.Generator().manual_seed(0)

    def randomly(seed: int) -> dict[str, torch.Tensor]:
        return {k: torch.randn(t.shape, generator=generator) for k, t in fresh_factors(sites, 2, seed).items()}

    past, new = randomly(0), randomly(1)
    penalty = Overlap.of(sites, past, 3.0)
    a, b = updates(sites, past), updates(sites, new)
    assert float(penalty.term(new)) == pytest.approx(3 * sum(float((a[k] * b[k]).pow(2).sum()) for k in a), rel=1e-5)
    for site, projection, _ in sites.parts:
        key = site.key(projection, "B")
        past[key][1:], new[key][0] = 0, 0
    assert float(Overlap.of(sites, past, 3.0).term(new)) == 0


def test_a_strong_penalty_keeps_the_update_small(base: BaseModel, tmp_path: Path) -> None:
    """With a large weight C-LoRA's second update is smaller than without; so is what EWC lets the factors move."""
    for method, knob in (("c-lora", "c_lora_lambda"), ("ewc", "ewc_lambda")):
        sizes = []
        for weight in (0.0, 1e6):
            settings = replace(QUICK, method=method, factor_rate=1e-2, **{knob: weight})
            adapter = learned(base, tmp_path / f"{method}{weight}", settings, "dog", "cat")
            sizes.append(adapter.manifest.metrics["update_l1"])
        assert sizes[1] < sizes[0]


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(
    v_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DSC's loss between equal adapters has no gradient to speak of: scores and eps agree with both teachers' already."""
    base = v_base
    monkeypatch.setattr("trainer.loop.faster_precision", lambda _: nullcontext())
    settings = replace(QUICK, method="dsc")
    adapter = learned(base, tmp_path, settings, "dog")
    lesson = Lesson(base, adapter, check_new(base, adapter, concept("cat", 1)), (None,) * 3, settings, (adapter,))
    task = _task(lesson, {"latents": encode_concept(base, concept("cat", 1), 2, 0)})
    distil = consolidation(task, lesson.tokens, [adapter])
    factors = list(task.trainable.factors.values())
    equal = torch.autograd.grad(next(iter(distil.losses(0))), factors)
    with torch.no_grad():
        for factor in factors:
            factor.add_(0.05)
    moved = torch.autograd.grad(next(iter(distil.losses(0))), factors)
    assert max(float(g.abs().max()) for g in equal) < 0.01 * max(float(g.abs().max()) for g in moved)


def test_dsc_needs_the_versions_of_the_past(base: BaseModel, tmp_path: Path) -> None:
    """Without them it is refused before anything is trained."""
    adapter = learned(base, tmp_path, QUICK, "dog")
    with pytest.raises(TrainingError, match="each earlier concept"):
        learn(base, concept("cat", 1), adapter, replace(QUICK, method="dsc"), Record(tmp_path / "dsc"))


@pytest.fixture(scope="session")
def taught(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Adapter, Adapter]]:
    """A method's adapter after one concept and after two, learned once a session."""

    @cache
    def both(method: str) -> tuple[Adapter, Adapter]:
        settings, folder = replace(QUICK, method=method), tmp_path_factory.mktemp("taught")
        one = learned(base, folder / "one", settings, "dog")
        return one, learned(base, folder / "two", settings, "dog", "cat")

    return both


Taught = Callable[[str], tuple[Adapter, Adapter]]


@pytest.mark.parametrize("method", METHODS)
def test_earlier_tokens_never_move(base: BaseModel, taught: Taught, method: str) -> None:
    """Learning a second concept leaves the first one's token bit for bit as it was, and the base's weights too."""
    weights = {n: p.clone() for n, p in base.unet.named_parameters()}
    one, two = taught(method)
    assert torch.equal(one.embeddings["<dog>"], two.embeddings["<dog>"])
    assert two.tokens == ["<dog>", "<cat>"]
    assert all(torch.equal(weights[n], p) for n, p in base.unet.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_learning_changes_the_new_concept(base: BaseModel, taught: Taught, method: str) -> None:
    """After learning, K,V of the new token's prompt differ from the base's by more than rounding."""
    adapter, _ = taught(method)
    plain = replace(adapter, lora={})
    change = largest_change(
        packed_of(base, plain, ["a photo of <dog>"]), packed_of(base, adapter, ["a photo of <dog>"])
    )
    assert change > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_bit_for_bit(base: BaseModel, taught: Taught, tmp_path: Path, method: str) -> None:
    """A second concept stopped in its first steps and again in its last ones ends as a straight run's."""
    settings = replace(QUICK, method=method)
    first, straight = taught(method)
    record, broken = Record(tmp_path / "broken"), 0

    def stop(progress: Progress) -> None:
        nonlocal broken
        if progress.step in {2, progress.steps - 1} and broken < progress.step:
            broken = progress.step
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            learn(base, concept("cat", 1), first, settings, record, past=[first], resume=True, progress=stop)
    resumed = learn(base, concept("cat", 1), first, settings, record, past=[first], resume=True, progress=stop)
    assert resumed.content_hash == straight.content_hash
    assert resumed.training.keys() == straight.training.keys()
    for kind, tensors in straight.training.items():
        assert resumed.training[kind].keys() == tensors.keys()
        assert all(torch.equal(resumed.training[kind][name], tensor) for name, tensor in tensors.items())


def test_factors_that_are_moved_on_keep_their_rank(base: BaseModel, tmp_path: Path) -> None:
    """Another rank asked for later changes nothing, and the version says the rank that it has."""
    first = learned(base, tmp_path, replace(QUICK, method="none"), "dog")
    other = replace(QUICK, method="none", rank=QUICK.rank + 2)
    second = learn(base, concept("cat", 1), first, other, Record(tmp_path / "cat"))
    assert second.manifest.settings["rank"] == QUICK.rank
    assert {k: t.shape for k, t in second.lora.items()} == {k: t.shape for k, t in first.lora.items()}


def test_concepts_start_from_different_tokens(base: BaseModel, tmp_path: Path) -> None:
    """Two concepts of one sequence and one class word do not begin as one and the same word."""
    still = replace(QUICK, token_rate=0.0)
    one = learned(base, tmp_path / "one", still, "dog")
    two = learned(base, tmp_path / "two", still, "dog", "cat")
    assert torch.equal(one.embeddings["<dog>"], two.embeddings["<dog>"])
    assert not torch.equal(two.embeddings["<dog>"], two.embeddings["<cat>"])


def test_captions_are_learned_under(base: BaseModel, tmp_path: Path) -> None:
    """A picture's caption, its `{}` being the token, changes what is learned; `prompts` shows how each is read."""
    plain = concept("dog")
    written = Concept(
        "dog",
        tuple(
            replace(p, caption=c)
            for p, c in zip(plain.pictures, ("{} on the moon", "the <dog>", "a red bowl"), strict=True)
        ),
    )
    start = empty_adapter(base.spec.entry)
    entry = check_new(base, start, written)
    lesson = Lesson(base, start, entry, written.captions, QUICK)
    assert lesson.prompts[len(entry.templates) : -1] == [
        "<dog> on the moon",
        "the <dog>",
        "a photo of <dog>, a red bowl",
    ]
    assert lesson.caption_slots().tolist() == [4, 4, 5, 5, 6, 6]
    with_captions = learn(base, written, start, QUICK, Record(tmp_path / "captions"))
    assert with_captions.content_hash != learned(base, tmp_path / "plain", QUICK, "dog").content_hash


def test_prior_preservation_asks_for_pictures_once(base: BaseModel, tmp_path: Path) -> None:
    """Pictures of the class are drawn under its prompt, kept with the run, and change what is learned."""
    asked: list[tuple[str, int]] = []

    def prior(prompt: str, count: int) -> list[Image.Image]:
        asked.append((prompt, count))
        return [Image.fromarray(np.full((64, 64, 3), 90, np.uint8))] * count

    def stop(progress: Progress) -> None:
        if progress.step == 2 and len(asked) == 1:
            asked.append(("stopped", 0))
            raise KeyboardInterrupt

    settings = replace(QUICK, prior_weight=1.0, prior_pictures=2)
    start, record = empty_adapter(base.spec.entry), Record(tmp_path / "prior")
    dog = replace(concept("dog"), class_word="dog")
    with pytest.raises(KeyboardInterrupt):
        learn(base, dog, start, settings, record, prior=prior, progress=stop)
    adapter = learn(base, dog, start, settings, record, prior=prior, resume=True, progress=stop)
    assert asked == [("a photo of dog", 2), ("stopped", 0)]
    plain = learn(base, dog, start, replace(settings, prior_weight=0.0), Record(tmp_path / "plain"))
    assert adapter.content_hash != plain.content_hash


def test_a_resumed_run_must_bring_the_same_pictures(base: BaseModel, tmp_path: Path) -> None:
    """Other pictures under the same name do not silently go on with the old ones' latents."""
    start, record = empty_adapter(base.spec.entry), Record(tmp_path)
    learn(base, concept("dog"), start, QUICK, record)
    other = Concept("dog", tuple(Picture(p.entry, p.image.rotate(90)) for p in concept("dog").pictures))
    with pytest.raises(TrainingError, match="other pictures"):
        learn(base, other, start, QUICK, record, resume=True)


def test_what_was_not_learned_is_told(base: BaseModel, tmp_path: Path) -> None:
    """The share of the concept's own pictures that scores tell apart stands in every version's metrics, between 0 and 1."""
    adapter = learned(base, tmp_path, QUICK, "dog", "cat")
    assert 0 <= float(str(adapter.manifest.metrics["own_dc_accuracy"])) <= 1
