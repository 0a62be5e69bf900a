"""Learning one concept after another: pictures in, an adapter out. Knows no store and no engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib.metadata import version

import torch
from PIL import Image
from torch import Tensor

from cpserve.adapter import Adapter, Tensors
from cpserve.base import BaseModel
from cpserve.concept import Concept
from cpserve.errors import TrainingError
from cpserve.manifest import ConceptEntry, Manifest, check_name
from cpserve.prompts import CPU, tokenize
from trainer.consolidate import consolidation
from trainer.fisher import fisher, sampled_rivals
from trainer.images import digest, encode_concept, encode_pictures
from trainer.learned import own_accuracy
from trainer.loop import Penalty, Progress, Stage, Task, optimise, prepare
from trainer.lora import Trainable, rank_of, recompress, start_token, states, trainable
from trainer.methods import BY_NAME, Method
from trainer.penalties.c_lora import Overlap, updates
from trainer.penalties.ewc import Anchor, decay
from trainer.penalties.null_space import basis_of, largest_change
from trainer.record import Record, Run
from trainer.settings import GENERIC_PROMPT, NOUNS, PROTECTED, TEMPLATES, UNSEEN, UNSEEN_NOUNS, Settings

PROMPTS = 16  # at a time: 120 MB of K,V of Stable Diffusion 1.5
LIBRARIES = ("cpserve", "torch", "diffusers", "transformers")


@dataclass(frozen=True, eq=False)
class Lesson:
    """What one concept's learning stands on; `past[i]` is the version in which the i-th earlier concept was learned."""

    base: BaseModel
    start: Adapter
    entry: ConceptEntry
    captions: Sequence[str | None]
    settings: Settings
    past: Sequence[Adapter] = ()

    @property
    def method(self) -> Method:
        return BY_NAME[self.settings.method]

    @property
    def tokens(self) -> list[str]:
        return [*self.start.tokens, self.entry.token]

    @property
    def prompts(self) -> list[str]:
        """What is learned under: the templates, the pictures' own captions, and last the class for prior preservation."""
        token = self.entry.token
        own = [self._captioned(caption) for caption in self.captions if caption]
        return [*(t.format(token) for t in self.entry.templates), *own, class_prompt(self.entry.class_word)]

    def _captioned(self, caption: str) -> str:
        """A caption as a prompt: its `{}` or the token itself stands for the concept; where there is neither, or only beyond
        what the text encoder reads, it follows after a neutral wording.
        """
        token = self.entry.token
        text = caption.replace("{}", token)
        number = len(self.base.spec.tokenizer) + len(self.start.tokens)
        return text if (self.ids([text]) == number).any() else f"{TEMPLATES[0].format(token)}, {text}"

    def caption_slots(self) -> Tensor:
        """For each latent its caption's place among `prompts`, or -1; `[pictures * variants]`."""
        slots, following = [], len(self.entry.templates)
        for caption in self.captions:
            slots.append(following if caption else -1)
            following += bool(caption)
        return torch.tensor(slots).repeat_interleave(self.settings.variants)

    def ids(self, texts: Sequence[str]) -> Tensor:
        return tokenize(self.base.spec.tokenizer, texts, self.tokens)


def class_prompt(class_word: str | None) -> str:
    """The prompt that prior preservation keeps."""
    return TEMPLATES[0].format(class_word) if class_word else GENERIC_PROMPT


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
        TrainingError: a method with a Fisher after versions without one, or with another.
    """
    wanted, known = BY_NAME[settings.method].fisher, BY_NAME.get(start.manifest.method, Method()).fisher
    if wanted and start.manifest.concepts and (wanted != known or "ewc" not in start.training):
        raise TrainingError(
            f"{settings.method} needs its Fisher information of earlier concepts, which {start.manifest.method!r} did not keep",
            hint=f"go on with --method {start.manifest.method}, or start another --adapter",
        )


def learn(
    base: BaseModel,
    concept: Concept,
    start: Adapter,
    settings: Settings,
    record: Record,
    *,
    past: Sequence[Adapter] = (),
    prior: Callable[[str, int], Sequence[Image.Image]] | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Adapter:
    """Learn one concept on top of `start`. The record is kept until its caller has stored the result.

    `past[i]` is the version in which the i-th earlier concept was learned (for `dsc`); `prior(prompt, count)` draws pictures
    with the base (for prior preservation).

    Raises:
        TrainingError: the concept cannot be learned next, another run is unfinished, or training broke down.
    """
    check_method(start, settings)
    if settings.prior_weight and not prior:
        raise TrainingError("prior_weight needs pictures of the class", hint="pass `prior`, or leave prior_weight at 0")
    if start.lora and not BY_NAME[settings.method].fresh:  # its own factors are moved on, whatever rank was asked for
        settings = replace(settings, rank=rank_of(start.lora))
    lesson = Lesson(
        base,
        start.to(base.device),
        check_new(base, start, concept),
        concept.captions,
        settings,
        [version.to(base.device) for version in past],
    )
    if lesson.method.consolidate and len(past) != len(start.tokens):
        raise TrainingError(
            f"{settings.method} needs the version in which each earlier concept was learned, and not all are here",
            hint="choose another --method, or pull those: cpserve adapters pull hf://USER/REPO@vN",
        )
    run = Run(
        concept=lesson.entry,
        settings=settings.dump(),
        base=base.spec.entry.fingerprint,
        start=start.content_hash,
        pictures=digest(concept),
    )
    prepare(base)  # before the prior is drawn: in another layout its pictures differ
    if resume and record.exists():
        if not run.same_as(record.read_run()):
            raise TrainingError(
                "the unfinished run learns something else: other pictures, settings or another version before it",
                hint="ask for the same, or drop it: train again with --restart",
                state=str(record.folder),
            )
    else:
        latents = {"latents": encode_concept(base, concept, settings.variants, settings.seed, mirror=settings.mirror)}
        if prior and settings.prior_weight:
            drawn = prior(class_prompt(concept.class_word), settings.prior_pictures)
            latents["prior"] = encode_pictures(base, drawn)
        record.begin(run, latents)
    return _learn(lesson, record, progress)


def _learn(lesson: Lesson, record: Record, progress: Callable[[Progress], None] | None) -> Adapter:
    settings, method = lesson.settings, lesson.method
    task = _task(lesson, record.latents())
    consolidating = settings.dsc_steps if method.consolidate and lesson.start.tokens else 0
    total = settings.steps + consolidating
    model, penalty = task.trainable, _penalty(lesson, task.trainable)
    groups = [({"token": model.token}, settings.token_rate), (model.factors, settings.factor_rate)]
    stage = Stage("learn", task.losses, groups, settings.steps, settings.warm_up, 0, total, penalty, task.nothing)
    optimise(stage, record, progress)
    metrics = {}
    if consolidating:
        distil = consolidation(task, lesson.tokens, lesson.past)
        rates = [(model.factors, settings.dsc_rate)]
        stage = Stage(
            "consolidate", distil.losses, rates, consolidating, settings.warm_up, settings.steps, total, penalty
        )
        optimise(stage, record, progress)
        metrics["dsc_tau"] = distil.tau
    if model.complement is not None:
        metrics["free_directions"] = round(float(model.complement.diagonal().mean()), 3)
    lora = recompress(lesson.base.spec.sites, model.lora()) if method.fresh else model.lora()
    training, tau = _kept(lesson, task)
    manifest = Manifest(
        base=lesson.base.spec.entry,
        concepts=(*lesson.start.manifest.concepts, lesson.entry),
        method=settings.method,
        settings=settings.dump(),
        metrics={**metrics, **tau, **_measured(lesson, task, lora)},
        libraries={name: version(name) for name in LIBRARIES},
    )
    embeddings = {**lesson.start.embeddings, lesson.entry.token: model.token.detach().to(CPU, copy=True)}
    return Adapter(manifest, lora, embeddings, training, text_widths=lesson.base.spec.text_widths).to(CPU)


def _task(lesson: Lesson, latents: dict[str, Tensor]) -> Task:
    base, start, settings, method = lesson.base, lesson.start, lesson.settings, lesson.method
    seed = settings.seed + len(start.tokens)
    token = start_token(base, lesson.entry.class_word, seed)
    earlier = start.extra_rows(len(token)).to(base.device)
    protected = _protected_basis(lesson, earlier, token) if method.protect else None
    model = trainable(base, start, token, settings.rank, seed, protected, fresh=method.fresh)
    return Task(
        base,
        settings,
        latents["latents"],
        lesson.ids(lesson.prompts),
        earlier,
        model,
        templates=len(lesson.entry.templates),
        captions=lesson.caption_slots(),
        prior=latents.get("prior"),
    )


def _penalty(lesson: Lesson, model: Trainable) -> Penalty | None:
    """What holds the factors back while they learn, summed up; nothing for the first concept."""
    kept, terms = lesson.start.training.get("ewc", {}), []
    if lesson.method.fisher and kept:
        theta = {k: lesson.start.lora[k].float() for k in kept}
        weight = lesson.settings.dc_lambda if lesson.method.fisher == "dc" else lesson.settings.ewc_lambda
        terms.append(Anchor(theta, kept, weight).term)
    if lesson.method.overlap and model.frozen:
        terms.append(Overlap.of(model.sites, model.frozen, lesson.settings.c_lora_lambda).term)
    return (lambda parameters: reduce(torch.add, (term(parameters) for term in terms))) if terms else None


def _protected_texts(tokens: Sequence[str]) -> list[str]:
    """Prompts whose K,V must stay: the empty one (guidance uses it) and every known token in every wording."""
    return ["", *(wording.format(token) for token in tokens for wording in PROTECTED)]


def _states(lesson: Lesson, texts: Sequence[str], earlier: Tensor, token: Tensor) -> Iterator[Tensor]:
    """The states `[P,S,d]` of prompts, some at a time: a big base's K,V of all of them would fill the memory."""
    for ids in lesson.ids(texts).split(PROMPTS):
        yield lesson.base.spec.sites.split(states(lesson.base, ids, earlier, token).float())[0]


def _ordinary_texts(nouns: Sequence[str], wordings: Sequence[str]) -> list[str]:
    """Prompts that no concept should change: every noun in every wording, with an article where it has none."""
    bare = re.compile(r"\b(a|the|my|small|big|lovely) {}")
    return [wording.format(noun if bare.search(wording) else f"a {noun}") for noun in nouns for wording in wordings]


@torch.no_grad()
def _protected_basis(lesson: Lesson, earlier: Tensor, token: Tensor) -> Tensor:
    """Q `[d,q]` of the prompts known before this lesson; from text alone."""
    texts = [*_protected_texts(lesson.start.tokens), *_ordinary_texts(NOUNS[: lesson.settings.null_nouns], PROTECTED)]
    return basis_of(torch.cat([*_states(lesson, texts, earlier, token)]), lesson.settings.null_energy)


@torch.no_grad()
def _measured(lesson: Lesson, task: Task, lora: Tensors) -> dict[str, float]:
    """Of this lesson, whatever the method: how far the K,V of earlier concepts and of ordinary things moved, protected ones and
    unseen ones, how large the update is (the sum of `|B A|`), and how many of the concept's own pictures were told from the others.
    """
    sites, before = lesson.base.spec.sites, {k: t.float() for k, t in lesson.start.lora.items()}

    def moved(texts: Sequence[str]) -> float:
        parts = _states(lesson, texts, task.earlier, task.trainable.token)
        return round(max(largest_change(sites.project(e, before), sites.project(e, lora)) for e in parts), 6)

    old, new = updates(sites, before), updates(sites, lora)
    size = sum(float((new[k] - old[k] if k in old else new[k]).abs().sum()) for k in new)
    return {
        "largest_kv_change": moved(_protected_texts(lesson.start.tokens)),
        "largest_unseen_kv_change": moved(
            [wording.format(t) for t in lesson.start.tokens or [""] for wording in UNSEEN]
        ),
        "largest_ordinary_kv_change": moved(_ordinary_texts(NOUNS, PROTECTED)),
        "largest_unseen_ordinary_kv_change": moved(_ordinary_texts(UNSEEN_NOUNS, UNSEEN)),
        "update_l1": round(size, 3),
        "own_dc_accuracy": round(own_accuracy(task, lesson.tokens, lora), 3),
    }


def _kept(lesson: Lesson, task: Task) -> tuple[dict[str, Tensors], dict[str, float]]:
    """What the next concept's training needs, and the temperature of the scores."""
    if not lesson.method.fisher:
        return {}, {}
    rivals = sampled_rivals(lesson.start.tokens, lesson.settings.dc_concepts, lesson.settings.seed)
    ids = lesson.ids(rivals) if lesson.method.fisher == "dc" else task.ids[:0]
    information, tau = fisher(task, ids)
    kept = decay(lesson.start.training.get("ewc", {}), information, lesson.settings.fisher_decay)
    return {"ewc": kept}, {"dc_tau": tau} if tau else {}
