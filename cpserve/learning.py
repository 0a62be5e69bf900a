"""Teach an adapter concepts and keep every version: the one place where trainer and store meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING
from warnings import warn as python_warning

import msgspec
from filelock import FileLock, Timeout
from PIL import Image

from cpserve.adapter import Adapter, check_fits, empty_adapter
from cpserve.base import BaseModel
from cpserve.concept import Concept
from cpserve.drawing import Drawing, generate
from cpserve.engines.eager import EagerEngine
from cpserve.errors import RefError, StoreError, TrainingError
from cpserve.manifest import Manifest, sample_name
from cpserve.png import png
from cpserve.prompts import Prompt
from cpserve.recognition import classify

if TYPE_CHECKING:
    from adapter_store import Store, Version
    from trainer import Progress, Record, Settings

DRAWN = 4  # samples of the concept just learned; of each earlier one the first
Report = Callable[[str, int, int, str], None]
"""(what, steps done, steps in all, how it goes)."""
LEAST_LEARNED = 0.5  # of the own pictures told from the others', and of the samples; below, the user is warned


def head_adapter(store: Store, name: str, base: BaseModel, method: str) -> Adapter:
    """The latest version of an adapter, ready to be trained on, or an empty one where there is none."""
    if store.head(name) == 0:
        return empty_adapter(base.spec.entry, method)
    version = store.version(name)
    return Adapter.read(version.manifest, version.read, for_training=True)


def learn(
    base: BaseModel,
    concepts: Sequence[Concept],
    store: Store,
    adapter: str,
    settings: Settings,
    *,
    resume: bool = False,
    restart: bool = False,
    progress: Report | None = None,
    warn: Callable[[str], None] = python_warning,
) -> list[Version]:
    """Learn concepts in the order given, one new version each, and return these; a killed run goes on with `resume`, bit for bit.

    `warn` is told before anything is learned that the adapter was learned on other weights than `base`'s, and after each
    concept that its own pictures are not told from the others', or that its samples do not show it.

    Raises:
        AdapterError: the adapter was learned on another architecture.
        TrainingError: a concept cannot be learned next, an unfinished run stands in the way, or training broke down.
        StoreError: the version cannot be kept; the run stays where it is for `resume`.
    """
    record = _record(store, adapter)
    with _alone(store, adapter):
        if store.head(adapter) and (other := check_fits(store.version(adapter).manifest, base.spec.entry)):
            warn(other)
        if restart:
            record.delete()
        check_way(store, adapter, resume=resume)
        _tidy(record, _known(store, adapter))
        learned: list[Version] = []
        for concept in concepts:
            if resume and concept.name in _known(store, adapter):
                continue
            start = head_adapter(store, adapter, base, settings.method)
            learned.append(
                _learn_one(base, concept, start, store, adapter, settings, record, resume=resume, progress=progress)
            )
            if doubt := _unlearned(learned[-1].manifest):
                warn(doubt)
    return learned


@contextmanager
def _alone(store: Store, adapter: str) -> Iterator[None]:
    """One process learns into an adapter at a time."""
    path = store.run_lock(adapter)
    lock = FileLock(path, timeout=1)  # `adapters list` holds it for a moment when it looks
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise TrainingError(
            f"another process is teaching {adapter!r}", hint="wait for it to end, or learn into another --adapter"
        ) from None
    except OSError as error:
        raise StoreError(
            f"{path.parent} cannot be written: {error.strerror or error}",
            hint="free some space, or choose another --store",
        ) from error
    try:
        yield
    finally:
        lock.release()


def clear_finished(store: Store, adapter: str) -> None:
    """Remove what nobody can go on with; no pictures' latents stay."""
    record = _record(store, adapter)
    if record.folder.exists():
        with _alone(store, adapter):
            _tidy(record, _known(store, adapter))


def drop_unfinished(store: Store, adapter: str) -> None:
    """Delete what an unfinished run keeps, latents of pictures among it; the adapter's versions stay.

    Raises:
        RefError: no run of it is unfinished.
        TrainingError: a process is teaching it, or the disk refuses.
    """
    record = _record(store, adapter)
    if not record.folder.exists():
        raise RefError(f"no training of {adapter!r} is unfinished", ref=adapter, hint="see: cpserve adapters list")
    with _alone(store, adapter):
        record.delete()


def delete(store: Store, adapter: str) -> tuple[int, int]:
    """Delete an adapter that is here with what its unfinished run keeps; how many versions and bytes that were.

    Raises:
        RefError: there is no such adapter and no such run.
        IntegrityError: another adapter is damaged, so that what it shares is not known; no version was deleted.
        StoreError: the system refuses. Said again, it goes on where it was.
        TrainingError: a process is teaching it.
    """
    record = _record(store, adapter)
    begun = record.folder.exists()
    if not begun:
        store.check_here(adapter)
    with _alone(store, adapter):
        record.delete()
        try:
            return store.delete(adapter)
        except RefError:
            if begun:
                return 0, 0
            raise


def _record(store: Store, adapter: str) -> Record:
    from trainer import Record

    return Record(store.run(adapter))


def _known(store: Store, adapter: str) -> set[str]:
    if store.head(adapter) == 0:
        return set()
    return {concept.name for concept in store.version(adapter).manifest.concepts}


def check_way(store: Store, adapter: str, *, resume: bool) -> None:
    """Whether learning may begin.

    Raises:
        TrainingError: an unfinished run stands in the way.
    """
    record = _record(store, adapter)
    unfinished = record.read_run().concept.name if record.exists() else ""
    if unfinished and not resume and unfinished not in _known(store, adapter):
        raise TrainingError(
            f"an unfinished run of {record.folder.name!r} is here ({unfinished!r})",
            hint="add --resume to go on with it, or --restart to drop it",
            state=str(record.folder),
        )


def _tidy(record: Record, known: set[str]) -> None:
    """Remove a run that was killed before it was whole, or between its version's commit and this."""
    if not record.exists() or record.read_run().concept.name in known:
        record.delete()


def _learn_one(
    base: BaseModel,
    concept: Concept,
    start: Adapter,
    store: Store,
    name: str,
    settings: Settings,
    record: Record,
    *,
    resume: bool,
    progress: Report | None,
) -> Version:
    import trainer
    from adapter_store.card import render_card
    from trainer.methods import BY_NAME

    def prior(prompt: str, count: int) -> list[Image.Image]:
        return _draw(base, [Prompt(prompt)] * count, range(count), f"drawing {prompt!r}", progress)

    def told(at: Progress) -> None:
        if progress:
            progress(f"learning {concept.name}", at.step, at.steps, f"loss {at.loss:.4f}")

    base.spec.sites.check(start.lora)
    made = trainer.learn(
        base,
        concept,
        start,
        settings,
        record,
        past=_past(store, name, start) if BY_NAME[settings.method].consolidate else (),
        prior=prior,
        resume=resume,
        progress=told,
    )
    drawn = draw_samples(base, made, progress)
    made = _judged(base, replace(made, samples={name: png(image) for name, image in drawn.items()}), drawn)
    files = made.files()
    files["README.md"] = render_card(made.manifest, name, files).encode()
    head = start.manifest.version
    pin = store.version(f"{name}@v{head}").pin if head else None
    draft = msgspec.structs.replace(made.manifest, trained_from=pin)
    version = store.commit(name, files, draft, expected_head=head)
    record.delete()
    return version


def _judged(base: BaseModel, made: Adapter, drawn: Mapping[str, Image.Image]) -> Adapter:
    """With the share of the newest concept's samples that show it, to tell by `cpserve eval` what is left of it later."""
    *earlier, concept = made.manifest.concepts
    samples = [drawn[sample_name(concept.name, i)] for i in range(DRAWN)]
    with EagerEngine(base) as engine:
        answers = classify(engine, samples, made)
    share = sum(answer.label == concept.name for answer in answers) / len(answers)
    concepts = (*earlier, msgspec.structs.replace(concept, dc_accuracy=share))
    return replace(made, manifest=msgspec.structs.replace(made.manifest, concepts=concepts))


def _unlearned(manifest: Manifest) -> str | None:
    concept, told = manifest.concepts[-1], float(manifest.metrics["own_dc_accuracy"])
    shown = concept.dc_accuracy or 0.0
    if min(told, shown) >= LEAST_LEARNED:
        return None
    return (
        f"{concept.name} seems not to be learned: {told:.0%} of its own pictures are told from the others', and {shown:.0%} of "
        "its samples show it; look at the samples, and try more --steps, more pictures or a --class-word"
    )


def _past(store: Store, name: str, start: Adapter) -> list[Adapter]:
    """The version in which each concept so far was learned."""
    versions = [store.version(f"{name}@v{concept.since}") for concept in start.manifest.concepts]
    return [Adapter.read(version.manifest, version.read) for version in versions]


def _draw(
    base: BaseModel, prompts: Sequence[Prompt], seeds: Sequence[int], what: str, progress: Report | None
) -> list[Image.Image]:
    def told(done: int, steps: int) -> None:
        if progress:
            progress(what, done, steps, "")

    with EagerEngine(base) as engine:
        return [d.image for d in generate(engine, prompts, seeds, Drawing(guidance=3.0), progress=told)]


def draw_samples(base: BaseModel, adapter: Adapter, progress: Report | None = None) -> dict[str, Image.Image]:
    """Seeded pictures of every concept so far, DRAWN of the newest and one of each other, by file name."""
    *earlier, newest = adapter.manifest.concepts
    wanted = [(c, i) for c, each in (*((c, 1) for c in earlier), (newest, DRAWN)) for i in range(each)]
    prompts = [Prompt(f"a photo of {concept.token}", adapter) for concept, _ in wanted]
    images = _draw(base, prompts, [i for _, i in wanted], f"drawing {newest.name}", progress)
    return {sample_name(c.name, i): image for (c, i), image in zip(wanted, images, strict=True)}
