"""Learning one concept after another: pictures in, an adapter out. Knows no store and no engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor

from cpserve.adapter import Adapter, Tensors
from cpserve.base import BaseModel
from cpserve.concept import Concept
from cpserve.errors import TrainingError
from cpserve.manifest import ConceptEntry, Manifest, check_name
from cpserve.prompts import tokenize
from trainer.fisher import dc_fisher, sampled_rivals
from trainer.images import encode_concept
from trainer.loop import Progress, Task, optimise
from trainer.lora import recompress, start_token, states, trainable
from trainer.penalties.ewc import Anchor, decay
from trainer.penalties.null_space import extend_basis, largest_change
from trainer.record import Record, Run
from trainer.settings import PROTECTED, TEMPLATES, Settings

LIBRARIES = ("cpserve", "torch", "diffusers", "transformers")


@dataclass(frozen=True, eq=False)
class Lesson:
    """What one concept's learning stands on."""

    base: BaseModel
    start: Adapter
    entry: ConceptEntry
    settings: Settings

    @property
    def tokens(self) -> list[str]:
        return [*self.start.tokens, self.entry.token]

    def ids(self, texts: Sequence[str]) -> Tensor:
        return tokenize(self.base.spec.tokenizer, texts, self.tokens)


def check_new(base: BaseModel, start: Adapter, concept: Concept) -> ConceptEntry:
    """The entry of a concept that may be learned next.

    Raises:
        TrainingError: its name is taken, or its token is in the vocabulary already.
    """
    name = check_name(concept.name)
    token = f"<{name}>"
    if name in {c.name for c in start.manifest.concepts}:
        raise TrainingError(
            f"the adapter already knows a concept called {name!r}", hint="give another one: --name NAME"
        )
    if token in base.spec.tokenizer.get_vocab():
        raise TrainingError(f"{token} is a word of the base model", hint="give the concept another name: --name NAME")
    return ConceptEntry(
        name=name,
        token=token,
        class_word=concept.class_word,
        templates=TEMPLATES,
        since=0,
        pictures=len(concept.pictures),
    )


def check_method(start: Adapter, settings: Settings) -> None:
    """Refuse a change of method that needs what the earlier one did not keep.

    Raises:
        TrainingError: `ewc-dc` after versions without a Fisher.
    """
    if settings.method == "ewc-dc" and start.manifest.concepts and "ewc" not in start.training:
        raise TrainingError(
            f"ewc-dc needs the Fisher information of earlier concepts, which {start.manifest.method!r} did not keep",
            hint=f"go on with --method {start.manifest.method}, or start another --adapter",
        )


def learn(
    base: BaseModel,
    concept: Concept,
    start: Adapter,
    settings: Settings,
    record: Record,
    *,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Adapter:
    """Learn one concept on top of `start`. The record is kept until its caller has stored the result.

    Raises:
        TrainingError: the concept cannot be learned next, another run is unfinished, or training broke down.
    """
    check_method(start, settings)
    lesson = Lesson(base, start, check_new(base, start, concept), settings)
    run = Run(
        concept=lesson.entry, settings=settings.dump(), base=base.spec.entry.fingerprint, start=start.content_hash
    )
    if resume and record.exists():
        if record.read_run() != run:
            raise TrainingError(
                "the unfinished run learns something else or from another version",
                hint="ask for the same concept and settings, or drop it: train again with --restart",
                state=str(record.folder),
            )
    else:
        record.begin(run, encode_concept(base, concept, settings.variants, settings.seed))
    return _learn(lesson, record, progress)


def _learn(lesson: Lesson, record: Record, progress: Callable[[Progress], None] | None) -> Adapter:
    base, start, settings, entry = lesson.base, lesson.start, lesson.settings, lesson.entry
    token = start_token(base, entry.class_word, settings.seed)
    earlier = start.extra_rows(len(token))
    protected = _protected_basis(lesson, earlier, token) if settings.method == "null-space" else None
    seed = settings.seed + len(start.tokens)
    model = trainable(base, start, token, settings.rank, seed, protected, fresh=settings.method == "null-space")
    kept = start.training.get("ewc", {})
    anchor = Anchor({k: start.lora[k].float() for k in kept}, kept, settings.ewc_lambda) if kept else None
    ids = lesson.ids([template.format(entry.token) for template in entry.templates])
    task = Task(base, settings, record.latents(), ids, earlier, model, anchor if settings.method == "ewc-dc" else None)
    optimise(task, record, progress)
    training, metrics = _finish(lesson, task)
    lora = recompress(base.spec.sites, model.lora()) if settings.method == "null-space" else model.lora()
    manifest = Manifest(
        base=base.spec.entry,
        concepts=(*start.manifest.concepts, entry),
        method=settings.method,
        settings=settings.dump(),
        metrics={**metrics, **_change(lesson, lora, earlier, token)},
        libraries={name: version(name) for name in LIBRARIES},
    )
    return Adapter(manifest, lora, {**start.embeddings, entry.token: model.token.detach().clone()}, training)


def _protected_texts(tokens: Sequence[str]) -> list[str]:
    """Prompts whose K,V must stay: the empty one (guidance uses it) and every known token in every wording."""
    return ["", *(wording.format(token) for token in tokens for wording in PROTECTED)]


@torch.no_grad()
def _protected_basis(lesson: Lesson, earlier: Tensor, token: Tensor) -> Tensor:
    """Q `[d,q]` of the prompts known before this lesson; from text alone."""
    e = states(lesson.base, lesson.ids(_protected_texts(lesson.start.tokens)), earlier, token)
    return extend_basis(torch.zeros(e.shape[-1], 0), e.float(), lesson.settings.null_energy)


@torch.no_grad()
def _change(lesson: Lesson, lora: Tensors, earlier: Tensor, token: Tensor) -> dict[str, float]:
    """How far the K,V of earlier prompts moved in this lesson, whatever the method."""
    e = states(lesson.base, lesson.ids(_protected_texts(lesson.start.tokens)), earlier, token).float()
    sites = lesson.base.spec.sites
    before = sites.project(e, {k: t.float() for k, t in lesson.start.lora.items()})
    return {"largest_kv_change": round(largest_change(before, sites.project(e, lora)), 6)}


def _finish(lesson: Lesson, task: Task) -> tuple[dict[str, Tensors], dict[str, float]]:
    """What the next concept's training needs, and what was measured on the way."""
    if lesson.settings.method != "ewc-dc":
        return {}, {}
    texts = sampled_rivals(lesson.start.tokens, lesson.settings.dc_concepts, lesson.settings.seed)
    fisher, tau = dc_fisher(task, lesson.ids(texts))
    return {"ewc": decay(lesson.start.training.get("ewc", {}), fisher, lesson.settings.fisher_decay)}, {"dc_tau": tau}
