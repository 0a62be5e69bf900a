"""Laws of what holds earlier concepts in place, and of what is learned under."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from cpserve.adapter import Adapter, Tensors, empty_adapter
from cpserve.base import BaseModel, load_base
from cpserve.concept import Concept, Picture
from cpserve.errors import TrainingError
from cpserve.learning import _unlearned
from cpserve.prompts import tokenize
from cpserve.score import log_scores, predictions, squared, temperature
from tests.lessons import QUICK, concept, learned, lineage, packed_of
from tests.plain import pipeline
from trainer import METHODS, Progress, Record, learn
from trainer.consolidate import consolidation
from trainer.fisher import fisher, sampled_rivals
from trainer.images import encode_concept
from trainer.learned import own_accuracy
from trainer.lora import fold, fresh_factors, states
from trainer.penalties.c_lora import Overlap, updates
from trainer.penalties.ewc import decay
from trainer.penalties.ewc_dc import fisher_loss
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


def test_dscs_loss_is_that_of_its_definition(
    v_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two different past versions, written out for the one that the step draws; and in parts it is the same sum."""
    monkeypatch.setattr("trainer.loop.faster_precision", lambda _: nullcontext())
    settings = replace(QUICK, method="dsc", factor_rate=1e-2)
    dog, both = lineage(v_base, tmp_path, settings, "dog", "cat")
    rex = concept("rex", 2)
    lesson = Lesson(v_base, both, check_new(v_base, both, rex), (None,) * 3, settings, (dog, both))
    task = _task(lesson, {"latents": encode_concept(v_base, rex, 2, 0)})
    with torch.no_grad():
        for factor in task.trainable.factors.values():
            factor.add_(0.05)
    distil = consolidation(task, lesson.tokens, lesson.past)
    with torch.no_grad():
        for factor in task.trainable.factors.values():
            factor.mul_(1.5)
    seen = set()
    for step in range(8):
        generator = task.generator(step, stream=1)
        which = int(torch.randint(2, (1,), generator=generator))
        x0, draw = task.draw(settings.dsc_batch, generator)
        texts = ["a photo", f"a photo of {('<dog>', '<cat>')[which]}", "a photo of <rex>"]
        e = states(v_base, tokenize(v_base.spec.tokenizer, texts, lesson.tokens), task.earlier, task.trainable.token)
        past = v_base.spec.sites.project(e, {k: t.float() for k, t in (dog, both)[which].lora.items()})
        student = task.trainable.packed(e)
        new, old, now = (
            predictions(task.denoise(packed), v_base.spec.schedule, x0, draw, torch.arange(3))
            for packed in (distil.new[[0, 1 + which, 3]], past, student)
        )
        p = [log_scores(squared(eps, draw), distil.tau) for eps in (new, old, now)]
        agree = sum(-(p[i].exp() * p[2]).sum(1).mean() for i in (0, 1))
        near = (new[:, 2] - now[:, 2]).pow(2).mean() + (old[:, 1] - now[:, 1]).pow(2).mean()
        for wanted, weights in ((0.3 * agree, (0.3, 0.0)), (2 * near, (0.0, 2.0))):
            for parts in (1, 2):
                asked = replace(settings, dsc_scores=weights[0], dsc_eps=weights[1], accumulate=parts)
                loss = sum(replace(distil, task=replace(task, settings=asked)).losses(step))
                assert float(loss) == pytest.approx(float(wanted), rel=2e-3)
        seen.add(which)
    assert seen == {0, 1}


def test_ewc_dcs_loss_pulls_to_the_true_concept_and_away_from_the_others() -> None:
    """By hand, from three errors: L + delta (-log p_0 + log p_1 + log p_2), p the softmax of the errors over tau."""
    error = torch.tensor([[1.0, 3.0, 5.0]])
    p = np.exp([-0.5, -1.5, -2.5]) / np.exp([-0.5, -1.5, -2.5]).sum()
    wanted = 0.25 + 4 * (-np.log(p[0]) + np.log(p[1]) + np.log(p[2]))
    assert float(fisher_loss(error, torch.tensor(0.25), 2.0, 4.0)) == pytest.approx(wanted, rel=1e-5)


def test_the_fisher_is_that_of_its_definition(v_base: BaseModel, tmp_path: Path) -> None:
    """Written out draw by draw: the concept's own prompt is the true label, its denoising loss is a mean, gradients are squared."""
    dog = learned(v_base, tmp_path, replace(QUICK, method="ewc-dc"), "dog")
    settings = replace(QUICK, method="ewc-dc", dc_delta=0.5)
    lesson = Lesson(v_base, dog, check_new(v_base, dog, concept("cat", 1)), (None,) * 3, settings)
    task = _task(lesson, {"latents": encode_concept(v_base, concept("cat", 1), 2, 0)})
    texts = ["a photo of <cat>", "a photo", "a photo of <dog>"]
    found, tau = fisher(task, lesson.ids(texts[1:]))
    plain, none = fisher(task, lesson.ids([""])[:0])
    assert tau > 0
    assert none == 0
    wanted, denoising = ({k: torch.zeros_like(p) for k, p in task.trainable.factors.items()} for _ in "ab")
    for number in range(settings.fisher_draws):
        x0, draw = task.draw(1, task.generator(number, stream=3))
        e = states(v_base, lesson.ids(texts), task.earlier, task.trainable.token)
        eps = predictions(
            task.denoise(task.trainable.packed(e)), v_base.spec.schedule, x0, draw, torch.arange(len(texts))
        )
        off = (draw.noise[:, None] - eps).pow(2).flatten(2).sum(2)[0]
        p = torch.softmax(-off / tau, 0)
        loss = off[0] / x0.numel() + 0.5 * (-p[0].log() + p[1].log() + p[2].log())
        for total, value in ((wanted, loss), (denoising, off[0] / x0.numel())):
            gradients = torch.autograd.grad(value, list(task.trainable.factors.values()), retain_graph=True)
            for name, gradient in zip(total, gradients, strict=True):
                total[name] += gradient.pow(2) / settings.fisher_draws
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-2, atol=1e-3 * float(wanted[name].max()))
        torch.testing.assert_close(plain[name], denoising[name], rtol=1e-2, atol=1e-3 * float(denoising[name].max()))


def test_diffusers_computes_the_same_keys_and_values(
    folders: dict[str, Path], base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three concepts published: plain diffusers' projections of a prompt are the base's and the three updates' sum, to 1e-5."""
    updates_made: list[Tensors] = []

    def noted(first: Tensors, second: Tensors) -> dict[str, torch.Tensor]:
        updates_made.append(second)
        return fold(first, second)

    monkeypatch.setattr("trainer.lora.fold", noted)
    adapter = learned(base, tmp_path, replace(QUICK, factor_rate=1e-2), "dog", "cat", "bowl")
    assert len(updates_made) == 3
    text = "a photo of <dog>, <cat> and <bowl>"
    pipe = pipeline(folders["sd15"], adapter)
    with torch.no_grad():
        e = pipe.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
        layers, sites = dict(pipe.unet.named_modules()), base.spec.sites
        ours = sites.project(e, {}) + sum(sites.project_change(e, u) for u in updates_made)
        for site, projection, cut in sites.parts:
            theirs = getattr(layers[site.name], projection)(e)
            torch.testing.assert_close(ours[..., cut], theirs, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(packed_of(base, adapter, [text])[..., cut], theirs, atol=1e-5, rtol=1e-5)
    assert largest_change(packed_of(base, replace(adapter, lora={}), [text]), ours) > 1e-2


def test_online_ewc_forgets_by_gamma() -> None:
    """gamma F_old + F_new, and F_new where nothing was known before."""
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    kept = decay({"a": one}, {"a": two, "b": one}, 0.5)
    assert [kept["a"].tolist(), kept["b"].tolist()] == [[10.5, 21.0], [1.0, 2.0]]


def test_the_temperature_is_the_median_gap() -> None:
    """Of all pairs of labels and all pictures: gaps 1, 2, 3 and 4, 4, 8 have 3 in the lower middle; of one label it is 1."""
    assert temperature(torch.tensor([[0.0, 1.0, 3.0], [0.0, 4.0, 8.0]])) == pytest.approx(3.0)
    assert temperature(torch.tensor([[5.0]])) == 1


def test_rivals_are_known_concepts_and_the_generic_prompt() -> None:
    """As many as asked for, each once, others under another seed; all of them where there are fewer."""
    tokens = [f"<c{i}>" for i in range(6)]
    drawn = [sampled_rivals(tokens, 3, seed) for seed in range(20)]
    assert all(rivals[0] == "a photo" and len(set(rivals)) == 4 for rivals in drawn)
    assert {text for rivals in drawn for text in rivals[1:]} == {f"a photo of {token}" for token in tokens}
    assert len(sampled_rivals(tokens, 9, 0)) == 7


def test_dsc_needs_the_versions_of_the_past(base: BaseModel, tmp_path: Path) -> None:
    """Without them it is refused before anything is trained."""
    adapter = learned(base, tmp_path, QUICK, "dog")
    with pytest.raises(TrainingError, match="each earlier concept"):
        learn(base, concept("cat", 1), adapter, replace(QUICK, method="dsc"), Record(tmp_path / "dsc"))


@pytest.fixture(scope="session")
def taught(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Adapter]]:
    """A method's adapter after one concept and after two, learned once a session."""

    @cache
    def both(method: str) -> list[Adapter]:
        return lineage(base, tmp_path_factory.mktemp("taught"), replace(QUICK, method=method), "dog", "cat")

    return both


Taught = Callable[[str], tuple[Adapter, Adapter]]


@pytest.mark.parametrize("method", METHODS)
def test_earlier_tokens_never_move(folders: dict[str, Path], base: BaseModel, taught: Taught, method: str) -> None:
    """Learning a second concept leaves the first one's token bit for bit as it was, and the base as it is on disk."""
    one, two = taught(method)
    assert torch.equal(one.embeddings["<dog>"], two.embeddings["<dog>"])
    assert two.tokens == ["<dog>", "<cat>"]
    untouched = load_base(str(folders["sd15"]))
    for part in ("unet", "text_encoder"):
        weights = getattr(base, part).state_dict()
        assert weights
        assert all(torch.equal(weights[name], tensor) for name, tensor in getattr(untouched, part).state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_learning_changes_the_new_concept(base: BaseModel, taught: Taught, method: str) -> None:
    """After learning, K,V of the new token's prompt differ from the base's by more than rounding, and the manifest says how
    far those of other prompts moved.
    """
    adapter, _ = taught(method)
    plain = replace(adapter, lora={})
    change = largest_change(
        packed_of(base, plain, ["a photo of <dog>"]), packed_of(base, adapter, ["a photo of <dog>"])
    )
    assert change > 1e-4
    metrics = adapter.manifest.metrics
    assert {"largest_kv_change", "largest_ordinary_kv_change"} <= metrics.keys()
    assert all(float(str(metrics[f"largest_{what}_kv_change"])) > 0 for what in ("unseen", "unseen_ordinary"))


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
    one, two = lineage(base, tmp_path, still, "dog", "cat")
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
    long = "a red bowl on the moon, " * 20 + "with {}"
    assert replace(lesson, captions=(long,)).prompts[4].startswith("a photo of <dog>, a red bowl")
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


def test_a_prior_is_the_same_whatever_was_learned_before(folders: dict[str, Path], tmp_path: Path) -> None:
    """The base draws it in training's memory layout, be the base fresh or used: else a resumed sequence would differ."""
    settings, layouts = replace(QUICK, prior_weight=1.0, prior_pictures=1), []
    base = load_base(str(folders["sd15"]))

    def prior(_: str, count: int) -> list[Image.Image]:
        layouts.append({p.stride() for p in base.unet.parameters() if p.dim() == 4})
        return [Image.new("RGB", (64, 64), "grey")] * count

    for name in ("dog", "cat"):
        learn(base, concept(name), empty_adapter(base.spec.entry), settings, Record(tmp_path / name), prior=prior)
    assert layouts[0] == layouts[1]


def test_a_resumed_run_must_bring_the_same_pictures(base: BaseModel, tmp_path: Path) -> None:
    """Other pictures under the same name do not silently go on with the old ones' latents."""
    start, record = empty_adapter(base.spec.entry), Record(tmp_path)
    learn(base, concept("dog"), start, QUICK, record)
    other = Concept("dog", tuple(Picture(p.entry, p.image.rotate(90)) for p in concept("dog").pictures))
    with pytest.raises(TrainingError, match="other pictures"):
        learn(base, other, start, QUICK, record, resume=True)


def test_what_was_not_learned_is_told(base: BaseModel, tmp_path: Path) -> None:
    """The share of the concept's own pictures that scores tell apart stands in every version, and that of its samples that
    show it; below one half either is a warning.
    """
    made = learned(base, tmp_path, QUICK, "dog", "cat").manifest
    for own, drawn, told in ((0.49, 1.0, True), (0.5, 0.5, False), (1.0, 0.25, True)):
        concepts = (made.concepts[0], msgspec.structs.replace(made.concepts[1], dc_accuracy=drawn))
        metrics = {**made.metrics, "own_dc_accuracy": own}
        warning = _unlearned(msgspec.structs.replace(made, concepts=concepts, metrics=metrics))
        assert bool(warning and "cat seems not to be learned" in warning) is told
    assert 0 <= float(str(made.metrics["own_dc_accuracy"])) <= 1


def test_own_accuracy_is_the_share_of_pictures_that_the_concept_explains_best(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of errors made up for three pictures, the concept's own first: it is best in two of them, in parts or at once."""
    start = empty_adapter(base.spec.entry)
    lesson = Lesson(base, start, check_new(base, start, concept("dog")), (), QUICK)
    task = _task(lesson, {"latents": torch.arange(3.0)[:, None, None, None].expand(3, 4, 8, 8)})
    table = torch.tensor([[1.0, 2.0], [3.0, 2.0], [1.0, 9.0]])
    monkeypatch.setattr("trainer.learned.errors", lambda _, __, x0, *___: table[x0[:, 0, 0, 0].long()])
    for parts in (1, 2):
        cut = replace(task, settings=replace(QUICK, accumulate=parts))
        assert own_accuracy(cut, ["<dog>"], {}) == pytest.approx(2 / 3)
