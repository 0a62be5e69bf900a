"""Laws of learning, on a base small enough to train in seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
import torch
from PIL import Image

from adapter_store import Store
from cpserve.adapter import empty_adapter
from cpserve.base import BaseModel, load_base
from cpserve.concept import Concept
from cpserve.errors import RefError, StoreError, TrainingError
from cpserve.learning import head_adapter
from cpserve.learning import learn as learn_and_keep
from cpserve.prompt_kv import KVSites
from cpserve.prompts import CPU, tokenize
from cpserve.score import draws, errors, log_scores, temperature
from cpserve.text_encoder import token_table
from tests.lessons import QUICK, concept, learned, lineage, packed_of
from trainer import Progress, Record, Settings, learn
from trainer.images import encode_concept, variant
from trainer.loop import RunningLoss, Stage, faster_precision, optimise
from trainer.lora import fold, fresh_factors, recompress, states
from trainer.penalties import null_space
from trainer.penalties.ewc import Anchor, fisher_information
from trainer.penalties.null_space import basis_of, largest_change
from trainer.sequence import Lesson, _task, check_new

NULL_SPACE = replace(QUICK, method="null-space", null_energy=1e-3)


@pytest.fixture(scope="session")
def base(bases: dict[str, BaseModel]) -> BaseModel:
    return bases["sd15"]


@pytest.fixture(scope="session")
def v_base(bases: dict[str, BaseModel]) -> BaseModel:
    return bases["sd21"]


def test_a_full_basis_freezes_earlier_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the basis holds all of them and leaves room, K,V of protected prompts stay to float precision, and others move."""
    monkeypatch.setattr("trainer.sequence.PROTECTED", ("{}",))  # two dozen wordings leave no room at such precision
    settings = replace(QUICK, method="null-space", null_nouns=0, null_energy=1e-12, factor_rate=0.1)
    base = load_base()
    one, two = lineage(base, tmp_path, settings, "dog", "cat")
    kept, moved = (
        largest_change(packed_of(base, one, [text]), packed_of(base, two, [text]))
        for text in ("<dog>", "a dog in snow")
    )
    assert kept < 1e-5
    assert moved > 0.1
    assert float(str(two.manifest.metrics["largest_kv_change"])) < 1e-5
    assert float(str(two.manifest.metrics["largest_unseen_kv_change"])) > 0.1


def test_ordinary_prompts_stay_as_they_were(base: BaseModel, tmp_path: Path) -> None:
    """What concerns no concept moves by a small part of what it does unprotected, from the first concept on."""
    settings = replace(NULL_SPACE, factor_rate=0.1)
    moved = [
        learned(base, tmp_path / f"{nouns}", replace(settings, null_nouns=nouns), "dog").manifest.metrics
        for nouns in (0, settings.null_nouns)
    ]
    without, protected = (float(str(metrics["largest_ordinary_kv_change"])) for metrics in moved)
    assert 0 < protected < 0.2 * without


def test_free_directions_are_those_that_an_update_spans(base: BaseModel, tmp_path: Path) -> None:
    """The share in the metrics is the rank of all layers' updates together, and the second concept has fewer."""
    one, two = lineage(base, tmp_path, replace(NULL_SPACE, null_nouns=0), "dog", "cat")
    rows = torch.cat([tensor for key, tensor in one.lora.items() if ".lora_A." in key])
    free = one.manifest.metrics["free_directions"]
    assert torch.linalg.matrix_rank(rows, rtol=1e-4) == round(free * rows.shape[1]) < len(rows)
    assert two.manifest.metrics["free_directions"] < free


def test_the_basis_keeps_what_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every protected row keeps all but `energy` of itself in the basis, which is orthonormal and no larger than it must be."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(null_space, "ROWS", 16)
    low = torch.randn(40, 24, generator=generator) @ torch.randn(24, 64, generator=generator)
    for rows, energy, most in ((low, 1e-9, 24), (low, 1e-1, 23), (torch.randn(9, 64, generator=generator), 1e-9, 9)):
        q, unit = basis_of(rows, energy), torch.nn.functional.normalize(rows, dim=1)
        assert float((unit - unit @ q @ q.T).pow(2).sum(1).max()) <= energy + 1e-6
        assert torch.allclose(q.T @ q, torch.eye(q.shape[1]), atol=1e-5)
        assert q.shape[1] <= most


def test_a_resumed_run_equals_a_straight_one(base: BaseModel, tmp_path: Path) -> None:
    """A run stopped at its third step and resumed gives the straight run's adapter bit for bit."""

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    straight = learned(base, tmp_path / "straight", QUICK, "dog")
    record, empty = Record(tmp_path / "broken"), empty_adapter(base.spec.entry)
    with pytest.raises(KeyboardInterrupt):
        learn(base, concept("dog"), empty, QUICK, record, progress=stop)
    seen: list[int] = []
    resumed = learn(base, concept("dog"), empty, QUICK, record, resume=True, progress=lambda p: seen.append(p.step))
    assert seen == [4, 5, 6]
    assert resumed.content_hash == straight.content_hash


def test_a_damaged_run_is_a_sentence(base: BaseModel, tmp_path: Path) -> None:
    """Whichever of its files lost its end, the error says how to begin anew."""
    record, empty = Record(tmp_path), empty_adapter(base.spec.entry)
    learn(base, concept("dog"), empty, QUICK, record)
    for name in ("learn.safetensors", "latents.safetensors", "run.json"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
        with pytest.raises(TrainingError, match="cannot be read") as caught:
            learn(base, concept("dog"), empty, QUICK, record, resume=True)
        assert "--restart" in caught.value.hint


def test_a_resumed_run_must_be_the_same_run(base: BaseModel, tmp_path: Path) -> None:
    """Resuming with another concept or other settings is refused, and the unfinished run stays."""
    record, empty = Record(tmp_path), empty_adapter(base.spec.entry)
    learn(base, concept("dog"), empty, QUICK, record)
    with pytest.raises(TrainingError, match="something else"):
        learn(base, concept("cat"), empty, QUICK, record, resume=True)
    assert record.read_run().concept.name == "dog"


def test_a_run_goes_on_in_smaller_parts(base: BaseModel, tmp_path: Path) -> None:
    """Where memory ran out, `accumulate` may change without the steps so far being lost; the adapter is the same to rounding."""

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    straight = learned(base, tmp_path / "straight", QUICK, "dog")
    record, empty, seen = Record(tmp_path / "broken"), empty_adapter(base.spec.entry), list[int]()
    with pytest.raises(KeyboardInterrupt):
        learn(base, concept("dog"), empty, QUICK, record, progress=stop)
    parts = replace(QUICK, accumulate=2)
    resumed = learn(base, concept("dog"), empty, parts, record, resume=True, progress=lambda p: seen.append(p.step))
    assert seen == [4, 5, 6]
    assert resumed.manifest.settings["accumulate"] == 2
    torch.testing.assert_close(resumed.embeddings["<dog>"], straight.embeddings["<dog>"], atol=1e-3, rtol=0)


def test_letters_are_not_mirrored() -> None:
    """Without `mirror` no crop of a picture whose left half is black has its right one black; with it, half of them do."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    for mirror, most in ((False, 0), (True, 28)):
        rng = np.random.default_rng(0)
        crops = [np.asarray(variant(Image.fromarray(pixels), 16, rng, mirror=mirror)) for _ in range(40)]
        turned = sum(bool(crop[:, 0].mean() > crop[:, -1].mean()) for crop in crops)
        assert (12 if mirror else 0) <= turned <= most  # 12 to 28 of 40 coins: all but one in a hundred


def test_v_prediction_trains(v_base: BaseModel, tmp_path: Path) -> None:
    """A v-prediction base learns too: the loss on fixed draws is smaller after training than before."""
    start, dog, settings = empty_adapter(v_base.spec.entry), concept("dog"), replace(QUICK, steps=40, factor_rate=1e-2)
    lesson = Lesson(v_base, start, check_new(v_base, start, dog), dog.captions, settings)
    task = _task(lesson, {"latents": encode_concept(v_base, dog, settings.variants, 0)})

    def loss() -> float:
        with torch.no_grad():
            return sum(float(part) for step in range(1000, 1016) for part in task.losses(step))

    before, model = loss(), task.trainable
    groups = [({"token": model.token}, settings.token_rate), (model.factors, settings.factor_rate)]
    optimise(Stage("learn", task.losses, groups, settings.steps, 2, 0, settings.steps), Record(tmp_path))
    assert loss() < before


def test_a_loss_that_depends_on_the_timestep_has_not_grown() -> None:
    """Batches of one, their loss falling by three orders of magnitude over the timesteps: of 200 runs none is ended."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        running = RunningLoss()
        for t in rng.uniform(0, 1000, 300):
            running.add(10 ** np.interp(t, [5, 500, 782, 995], np.log10([0.78, 0.074, 0.007, 0.0002])))
            assert not running.fault


def test_a_loss_that_has_grown_tenfold_is_told() -> None:
    """Whether it grew from the start or after it had fallen; and what it has fallen to is not held against a loss near zero."""
    early, late, tiny = RunningLoss(), RunningLoss(), RunningLoss()
    for step in range(40):
        early.add(0.5 * 1.5**step)
    for value in (*[0.5] * 30, *[0.1] * 100, *[3.0] * 40):
        late.add(value)
    for value in (*[0.5] * 30, *[1e-6] * 300, *[5e-3] * 100):
        tiny.add(value)
    assert [r.fault for r in (early, late, tiny)] == ["has grown tenfold", "has grown tenfold", None]


def test_a_diverged_run_says_so(base: BaseModel, tmp_path: Path) -> None:
    """A loss that is no longer a number ends the run with the state's folder in the error."""
    with pytest.raises(TrainingError, match="no longer a number") as caught:
        learned(base, tmp_path, replace(QUICK, factor_rate=1e30, steps=30), "dog")
    assert caught.value.state


def test_a_gradient_that_is_no_number_moves_nothing(tmp_path: Path) -> None:
    """Under a finite loss: the run ends within the step, and what is learned is as it was."""
    still = torch.nn.Parameter(torch.zeros(1))
    stage = Stage("learn", lambda _: [still.pow(2).sqrt().sum()], [({"still": still}, 0.1)], 9, 0, 0, 9)
    with pytest.raises(TrainingError, match="no longer a number at step 0"):
        optimise(stage, Record(tmp_path))
    assert still.item() == 0


def test_a_sudden_loss_ends_the_run_within_the_step(tmp_path: Path) -> None:
    """Far above what predicting nothing costs, however low it was before: nothing is stepped with it."""
    moved, before = torch.nn.Parameter(torch.zeros(1)), []

    def losses(step: int) -> list[torch.Tensor]:
        before.append(moved.item())
        return [moved.sum() - moved.item() + (0.1 if step < 30 else 3.5)]

    stage = Stage("learn", losses, [({"moved": moved}, 0.1)], 99, 0, 0, 99, nothing=1.0)
    with pytest.raises(TrainingError, match=r"is 3.5, .* at step 30"):
        optimise(stage, Record(tmp_path))
    assert moved.item() == before[30] < before[29]


def test_a_concept_whose_loss_is_far_above_that_of_nothing_is_not_learned(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first step on, where there is no lower loss before it."""
    monkeypatch.setattr("trainer.loop.Task.losses", lambda task, _: [100 + task.trainable.token.sum()])
    with pytest.raises(TrainingError, match="much more than predicting nothing costs"):
        learned(base, tmp_path, QUICK, "dog")


@pytest.mark.parametrize("name", ["sd15", "sd21"])
@pytest.mark.parametrize("brightness", [0.0, 3.0])
def test_nothing_costs_no_more_than_it_is_said_to(
    bases: dict[str, BaseModel], name: str, brightness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of noise and of v, of pictures that are none and of very bright ones, alone in a batch: at least about once that much."""
    base, dog = bases[name], replace(concept("dog"), class_word="dog")
    start, settings = empty_adapter(base.spec.entry), replace(QUICK, batch=1, prior_weight=0.5)
    latents = torch.full((1, 4, 16, 16), brightness)
    lesson = Lesson(base, start, check_new(base, start, dog), dog.captions, settings)
    task = _task(lesson, {"latents": latents, "prior": latents / 2})
    monkeypatch.setattr(base.unet, "forward", lambda z, *_: 0 * z)
    costs = [sum(float(part) for part in task.losses(step)) for step in range(200)]
    assert 0.9 * task.nothing < max(costs) < 1.2 * task.nothing


def test_a_run_that_diverged_does_so_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Resumed from its last state, in the middle of the growth, it ends at the same step."""
    monkeypatch.setattr("trainer.loop.SAVE_EVERY_S", -1.0)
    moved = torch.nn.Parameter(torch.zeros(1))

    def losses(step: int) -> list[torch.Tensor]:
        return [(0 * moved).sum() + (0.01 if step < 30 else 0.9)]

    stage = Stage("learn", losses, [({"moved": moved}, 0.1)], 99, 0, 0, 99)
    for _ in range(2):
        with pytest.raises(TrainingError, match="grown tenfold at step 31"):
            optimise(stage, Record(tmp_path))
        assert Record(tmp_path).load_state("learn")[1] == 31


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("dc_concepts", -1), ("null_nouns", -1), ("accumulate", 9)])
def test_a_count_out_of_range_is_refused(name: str, value: int) -> None:
    """By its name, with where it counts from."""
    with pytest.raises(TrainingError, match=f"{name} is {value}"):
        replace(QUICK, **{name: value})


def test_a_name_taken_twice_is_refused(base: BaseModel, tmp_path: Path) -> None:
    """The second concept of one name is refused before anything is trained."""
    adapter = learned(base, tmp_path, QUICK, "dog")
    with pytest.raises(TrainingError, match="already knows"):
        learn(base, concept("dog"), adapter, QUICK, Record(tmp_path / "again"))


def test_ewc_dc_needs_a_fisher(base: BaseModel, tmp_path: Path) -> None:
    """A change to ewc-dc after a method that kept no Fisher, or another, is refused; a change to null-space is not."""
    other = learned(base, tmp_path / "other", replace(QUICK, method="ewc"), "dog")
    with pytest.raises(TrainingError, match="Fisher"):
        learn(base, concept("cat", 1), other, replace(QUICK, method="ewc-dc"), Record(tmp_path / "ewc-dc"))
    adapter = learned(base, tmp_path, replace(QUICK, method="none"), "dog")
    with pytest.raises(TrainingError, match="Fisher"):
        learn(base, concept("cat", 1), adapter, replace(QUICK, method="ewc-dc"), Record(tmp_path / "ewc"))
    assert learn(base, concept("cat", 1), adapter, QUICK, Record(tmp_path / "null")).tokens == ["<dog>", "<cat>"]


def test_the_fisher_of_a_linear_regression() -> None:
    """For y = x . theta + noise of variance s^2, draws of -log p(y) come to mean(x^2) / s^2: within four of their standard
    errors, which are at most sqrt(4 / draws) of it (odds of chance: 2 in ten thousand, with the seed fixed).
    """
    draws, spread = 2000, 0.5
    theta, x = torch.tensor([1.0, -2.0, 0.5], requires_grad=True), torch.tensor([[1.0, 0.0, 2.0], [3.0, 1.0, 0.0]])
    noise = spread * torch.randn(draws, generator=torch.Generator().manual_seed(0))

    def loss(draw: int) -> torch.Tensor:
        row = x[draw % 2]
        return ((row @ theta).detach() + noise[draw] - row @ theta).pow(2) / (2 * spread**2)

    fisher = fisher_information({"theta": theta}, loss, draws)
    exact = x.pow(2).mean(0) / spread**2
    torch.testing.assert_close(fisher["theta"], exact, rtol=4 * (4 / draws) ** 0.5, atol=0.0)


def test_the_anchor_is_half_lambda_f_d_squared() -> None:
    """The penalty is zero at its anchor and lambda / 2 sum F d^2 away from it."""
    anchor = Anchor({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 3.0])}, 10.0)
    assert float(anchor.term({"w": torch.ones(2)})) == 0
    assert float(anchor.term({"w": torch.tensor([2.0, 0.0])})) == pytest.approx(10 / 2 * (1 + 3))


def test_folding_adds_and_recompression_is_exact(base: BaseModel) -> None:
    """A folded sum of updates, recompressed, gives the sum's K,V to 1e-5, at a rank that a layer can hold."""
    sites: KVSites = base.spec.sites
    generator = torch.Generator().manual_seed(0)
    parts = []
    for seed in range(6):
        factors = fresh_factors(sites, 16, seed)
        parts.append(
            {k: torch.randn(t.shape, generator=generator) * 0.05 if ".lora_B." in k else t for k, t in factors.items()}
        )
    total: dict[str, torch.Tensor] = {}
    for part in parts:
        total = fold(total, part)
    e = torch.randn(2, 5, sites.weight.shape[1], generator=generator)
    summed = sum(sites.project_change(e, part) for part in parts)
    small = recompress(sites, total)
    assert torch.allclose(sites.project_change(e, small), summed, atol=1e-5)
    assert all(len(small[s.key(p, "A")]) <= min(s.width, e.shape[-1]) for s, p, _ in sites.parts)


def test_scores_sum_to_one_whatever_the_order(base: BaseModel) -> None:
    """DC scores sum to one, and permuting the labels permutes them."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(4, base.spec.channels, 8, 8, generator=generator)
    e = base.encode_text(
        tokenize(base.spec.tokenizer, ["a", "b", "c"]), torch.zeros(0, base.spec.sites.weight.shape[1])
    )
    bank = base.spec.sites.project(e)
    draw = draws(0, 2, tuple(x0.shape[1:]), 100, 900)

    def scores(order: list[int]) -> torch.Tensor:
        with torch.no_grad():
            error = errors(lambda z, t, s: base.unet(z, t, bank, s), base.spec.schedule, x0, draw, torch.tensor(order))
        return log_scores(error, temperature(error)).exp()

    straight, turned = scores([0, 1, 2]), scores([2, 0, 1])
    assert torch.allclose(straight.sum(1), torch.ones(4), atol=1e-5)
    assert torch.allclose(straight[:, [2, 0, 1]], turned, atol=1e-4)


def test_text_states_of_earlier_tokens_do_not_see_the_new_one(base: BaseModel) -> None:
    """A prompt's states before the new token are the same whatever its embedding is; from there on they are not."""
    name, table = token_table(base.text_encoder)
    assert name.endswith("token_embedding.weight")
    ids = tokenize(base.spec.tokenizer, ["a photo of <dog> and <cat>"], ["<dog>", "<cat>"])
    at = int((ids[0] == len(base.spec.tokenizer) + 1).nonzero())
    a, b = (base.spec.sites.split(states(base, ids, table[5][None], table[i]))[0] for i in (7, 8))
    assert (ids[0, :at] == len(base.spec.tokenizer)).any()
    assert torch.equal(a[:, :at], b[:, :at])
    assert not torch.equal(a[:, at], b[:, at])


def test_latents_are_gone_once_the_version_stands(base: BaseModel, tmp_path: Path) -> None:
    """After the commit nothing of the pictures is left on disk: no run folder, no latents."""
    store = Store(tmp_path)
    [result] = learn_and_keep(base, [concept("dog")], store, "pets", QUICK)
    assert result.manifest.version == 1
    assert not list(tmp_path.rglob("latents*"))
    assert result.manifest.concepts[0].since == 1


def test_an_unfinished_run_stands_in_the_way(base: BaseModel, tmp_path: Path) -> None:
    """A second run over an unfinished one is refused until it is resumed or dropped; dropping starts anew."""
    store = Store(tmp_path)

    def stop(_what: str, done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_and_keep(base, [concept("dog")], store, "pets", QUICK, progress=stop)
    with pytest.raises(TrainingError, match="unfinished run") as caught:
        learn_and_keep(base, [concept("dog")], store, "pets", QUICK)
    assert "--resume" in caught.value.hint
    [result] = learn_and_keep(base, [concept("dog")], store, "pets", QUICK, restart=True)
    assert head_adapter(store, "pets", base, "none").content_hash
    assert result.manifest.version == 1


def test_what_was_learned_on_a_head_that_moved_on_is_not_lost(base: BaseModel, tmp_path: Path) -> None:
    """Another version came while a concept was learned: going back as the refusal says, and on, learns nothing once more."""
    store, steps = Store(tmp_path), []
    [first] = learn_and_keep(base, [concept("dog")], store, "pets", QUICK)

    def meanwhile(what: str, done: int, *_: object) -> None:
        if what == "learning cat":
            steps.append(done)
            if done == 1:
                store.commit("pets", {"a": b"1"}, first.manifest, expected_head=1)

    with pytest.raises(StoreError, match="has moved on") as caught:
        learn_and_keep(base, [concept("cat", 1)], store, "pets", QUICK, progress=meanwhile)
    assert "cpserve adapters rollback pets@v1" in caught.value.hint
    steps.clear()
    store.rollback(first)
    [second] = learn_and_keep(base, [concept("cat", 1)], store, "pets", QUICK, resume=True, progress=meanwhile)
    assert steps == []
    assert [c.token for c in second.manifest.concepts] == ["<dog>", "<cat>"]


def test_two_processes_cannot_teach_one_adapter(base: BaseModel, tmp_path: Path) -> None:
    """While one run teaches an adapter, another one of the same adapter is refused, and one of another adapter is not."""
    store, seen = Store(tmp_path), []

    def meanwhile(what: str, done: int, *_: object) -> None:
        if (what, done) == ("learning dog", 1):
            with pytest.raises(TrainingError, match="another process"):
                learn_and_keep(base, [concept("cat")], store, "pets", QUICK, restart=True)
            seen.append(learn_and_keep(base, [concept("cat")], store, "others", QUICK))

    learn_and_keep(base, [concept("dog")], store, "pets", QUICK, progress=meanwhile)
    assert len(seen) == 1
    assert store.head("pets") == store.head("others") == 1


def test_a_name_with_a_path_touches_nothing(base: BaseModel, tmp_path: Path) -> None:
    """An adapter's name that is a path is refused by the library before anything is removed or written."""
    store = Store(tmp_path / "store")
    (tmp_path / "store" / "precious").mkdir(parents=True)
    for name in ("../precious", "", "..", "a/b"):
        with pytest.raises(RefError):
            learn_and_keep(base, [concept("dog")], store, name, QUICK, restart=True)
    assert [p.name for p in (tmp_path / "store").iterdir()] == ["precious"]


def test_ewc_dc_goes_on_at_a_rank_past_the_layers_width(base: BaseModel, tmp_path: Path) -> None:
    """The Fisher fits the factors that the next concept starts from, also where their rank passes the layer's width."""
    settings = replace(QUICK, method="ewc-dc", rank=80)
    assert learned(base, tmp_path, settings, "dog", "cat").tokens == ["<dog>", "<cat>"]


def test_half_a_run_leaves_no_latents(base: BaseModel, tmp_path: Path) -> None:
    """Latents of a run that was killed before it was whole are gone once the next one begins."""
    store, folder = Store(tmp_path), tmp_path / "runs" / "pets"
    folder.mkdir(parents=True)
    (folder / "latents.safetensors").write_bytes(b"pictures of somebody")
    learn_and_keep(base, [concept("dog")], store, "pets", QUICK)
    assert not list(tmp_path.rglob("latents*"))


LONG = replace(QUICK, steps=80)


def kill(
    base: BaseModel,
    store: Store,
    concepts: list[Concept],
    settings: Settings,
    reaches: Callable[[str], bool],
    after: float,
) -> None:
    """Learn in a process that is killed so many seconds after what it reports `reaches` a moment."""

    def told(what: str, *_: object) -> None:
        if not reaches(what):
            return
        if after:
            Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(
        target=learn_and_keep,
        args=(base, concepts, store, "pets", settings),
        kwargs={"resume": True, "progress": told},
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not store.verify()


def test_killed_at_any_moment_training_goes_on(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kill -9` at 20 seeded moments, each time resumed: the store verifies, and the end equals an undisturbed run's."""
    monkeypatch.setattr("trainer.loop.SAVE_EVERY_S", 0.0)
    rng, store = np.random.default_rng(1), Store(tmp_path)
    straight = learned(base, tmp_path / "straight", LONG, "dog")
    for _ in range(20):
        steps = iter(range(1, int(rng.integers(1, 3))))

        def reaches(what: str, steps: Iterator[int] = steps) -> bool:
            return what == "learning dog" and next(steps, None) is None

        kill(base, store, [concept("dog")], LONG, reaches, rng.uniform(0, 0.01))  # into the next step, or its saving
    assert 0 < Record(tmp_path / "runs" / "pets").load_state("learn")[1] < LONG.steps
    learn_and_keep(base, [concept("dog")], store, "pets", LONG, resume=True)
    assert store.head("pets") == 1
    assert head_adapter(store, "pets", base, "none").content_hash == straight.content_hash


@pytest.mark.parametrize(("moment", "kept"), [("drawing dog", 0), ("learning cat", 1), ("drawing cat", 1)])
def test_killed_between_the_concepts_of_one_call(base: BaseModel, tmp_path: Path, moment: str, kept: int) -> None:
    """What stood stays, and the same call with `resume` ends as an undisturbed one."""
    store, both = Store(tmp_path), [concept("dog"), concept("cat", 1)]
    straight = learned(base, tmp_path / "straight", QUICK, "dog", "cat")
    kill(base, store, both, QUICK, lambda what: what == moment, 0)
    assert store.head("pets") == kept
    learn_and_keep(base, both, store, "pets", QUICK, resume=True)
    assert store.head("pets") == 2
    assert head_adapter(store, "pets", base, "none").content_hash == straight.content_hash


@pytest.mark.parametrize(
    ("can", "dtype"),
    [({"avx512_f": True, "avx512_bf16": False}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)],
)
def test_bf16_only_where_the_cpu_multiplies_it(
    can: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU with AVX-512 alone computes bf16 as well, at half of float32's speed."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    with faster_precision(CPU):
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == dtype
