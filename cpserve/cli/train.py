"""`cpserve train`."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpserve.cli._border import when_stopped
from cpserve.cli._common import (
    BASE,
    Common,
    adapters_base_option,
    base_of,
    common_options,
    examples,
    hub_options,
    open_base,
)
from cpserve.cli._show import emit, note, pairs, reporting, table
from cpserve.cli._train_hub import hub_training_options, learner

if TYPE_CHECKING:
    from adapter_store import Version
    from cpserve.concept import Concept
    from trainer import Settings

METHODS = (
    "none",
    "fold",
    "ewc",
    "ewc-dc",
    "dsc",
    "dsc+ewc-dc",
    "c-lora",
    "null-space",
)  # trainer's, which would cost `--help` an import of torch; a test compares them
ROWS_PER_S = 100  # of the built-in base's training on two AVX-512 cores: 400 steps of 16 rows in 64 s


@dataclass(frozen=True)
class _Plan:
    """What would be learned; `known` are the names that the adapter's head, version `head`, has learned already."""

    concepts: Sequence[Concept]
    adapter: str
    head: int
    known: Sequence[str]
    settings: Settings
    base: str
    revision: str | None

    @property
    def rows(self) -> int:
        """Of learning itself; DSC's second stage and prior preservation are not counted."""
        return len(self.concepts) * self.settings.steps * self.settings.batch

    def json(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter,
            "from": f"{self.adapter}@v{self.head}" if self.head else None,
            "known": list(self.known),
            "concepts": [
                {"name": c.name, "class_word": c.class_word, "pictures": len(c.pictures)} for c in self.concepts
            ],
            "base": self.base,
            "settings": self.settings.dump(),
            "rows": self.rows,
            "seconds": self.rows / ROWS_PER_S if self.base == BASE else None,
        }

    def text(self) -> str:
        versions = [f"{self.adapter}@v{self.head + i + 1}" for i in range(len(self.concepts))]
        rows = [(c.name, c.class_word or "", len(c.pictures), v) for c, v in zip(self.concepts, versions, strict=True)]
        start = (
            f"on top of {self.adapter}@v{self.head}, which knows {', '.join(self.known)}"
            if self.head
            else "from nothing"
        )
        settings = self.settings
        work = f"{len(rows)} x {settings.steps} steps x {settings.batch} rows = {self.rows:,} rows through the UNet and back"
        if self.base == BASE:
            work += f": about {self.rows / ROWS_PER_S:.0f} s on two cores with AVX-512"
        learned = table(("concept", "class word", "pictures", "becomes"), rows)
        return f"would learn, {start}, on {self.base}:\n\n{learned}\n\n{pairs(settings.dump())}\n\n{work}"


@click.command(
    epilog=examples(
        "cpserve train --concept dog.zip --class-word dog",
        "cpserve train --concept rocket.zip --concept cat.zip --dry-run",
        "cpserve train --concept rex.zip --class-word dog --concept tom.zip --class-word cat",
        "cpserve train --concept photos/ --name rex --adapter pets --config run.toml",
        "cpserve train --concept cat.zip --adapter hf://user/my-pets --push",
    )
)
@click.option(
    "--concept",
    "paths",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    metavar="ZIP_OR_FOLDER",
    help="Pictures of one concept. Give it several times to learn several, in that order.",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="The concept's name, once for each --concept.  [default: the file's, without its ending]",
)
@click.option(
    "--class-word",
    "class_words",
    multiple=True,
    metavar="WORD",
    help="The word for what it is, such as dog, once for each --concept: learning starts from it.",
)
@click.option(
    "--adapter", default="default", show_default=True, metavar="NAME", help="What learns it; also hf://USER/REPO."
)
@adapters_base_option
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help="What keeps earlier concepts from being forgotten.  [default: null-space]",
)
@click.option("--steps", type=click.IntRange(1), metavar="N", help="Steps for each concept.  [default: 300]")
@click.option("--rank", type=click.IntRange(1), metavar="R", help="Rank of the factors of each concept.  [default: 16]")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), metavar="N", help="The same seed gives the same adapter.  [default: 0]"
)
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="TOML",
    help="A file of settings, such as batch = 4 (docs/cli.md lists them); those on the command line win.",
)
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option("--restart", is_flag=True, help="Drop a run that was stopped.")
@click.option("--dry-run", is_flag=True, help="Say what would be learned, with all settings, and write nothing.")
@hub_training_options
@hub_options
@common_options
def train(
    common: Common,
    paths: tuple[Path, ...],
    names: tuple[str, ...],
    class_words: tuple[str, ...],
    adapter: str,
    base: str | None,
    config: Path | None,
    resume: bool,
    restart: bool,
    dry_run: bool,
    local: str | None,
    push: bool,
    fork: str | None,
    **given: Any,
) -> None:
    """Learn concepts in the order given, one new version each.

    Settings that are not given have the values that --dry-run shows.
    """
    if any(given and len(given) != len(paths) for given in (names, class_words)):
        raise click.UsageError(
            "--name and --class-word are given once for each --concept, in their order, or not at all"
        )
    if resume and restart:
        raise click.UsageError("--resume and --restart exclude each other")
    from cpserve.concept import read_concept
    from cpserve.learning import check_way, clear_finished
    from trainer.methods import BY_NAME

    settings = _settings(config, given)
    past = BY_NAME[settings.method].consolidate
    who = learner(common, adapter, local, push=push, fork=fork, past=past, dry_run=dry_run)
    if not restart:
        if not dry_run:
            clear_finished(common.store, who.name)
        check_way(common.store, who.name, resume=resume)
    concepts = [
        read_concept(path, name=name, class_word=word)
        for path, name, word in zip_longest(paths, names, class_words)  # all as long, or empty
    ]
    if resume:
        concepts = [concept for concept in concepts if concept.name not in who.known]
    _check_names(concepts, who.known)
    common.set_threads()
    source, revision = base_of(base, adapter, who.newest)
    plan = _Plan(concepts, who.name, who.head, who.known, settings, source, revision)
    if plan.base != BASE and settings.factor_rate == type(settings)().factor_rate:
        note(f"the defaults of rates and steps were chosen on {BASE}; for {plan.base} set your own with --config")
    if dry_run:
        emit(plan.json(), plan.text(), as_json=common.json)
        return
    learned = _learn(common, plan, resume=resume, restart=restart)
    _tell(common, plan, learned)
    who.push(common)


def _check_names(concepts: Sequence[Concept], known: Sequence[str]) -> None:
    """Refuse a name taken twice now, and not after the concepts before it were learned."""
    from cpserve.errors import TrainingError

    taken = set(known)
    for concept in concepts:
        if concept.name in taken:
            raise TrainingError(
                f"there would be two concepts called {concept.name!r}", hint="rename the file, or give it a --name"
            )
        taken.add(concept.name)


def _settings(config: Path | None, given: dict[str, Any]) -> Settings:
    from trainer import Settings

    table: dict[str, Any] = {}
    if config:
        try:
            table = tomllib.loads(config.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise click.BadParameter(f"{config} cannot be read: {error}", param_hint="--config") from None
    return Settings.of(table | {key: value for key, value in given.items() if value is not None})


def _learn(common: Common, plan: _Plan, *, resume: bool, restart: bool) -> list[Version]:
    from cpserve.engine import torch_device
    from cpserve.learning import learn

    kept = "what was learned so far is kept; to go on, add --resume to the same command"
    with reporting() as report, when_stopped(kept):
        base = open_base(common, plan.base, plan.revision).to(torch_device())
        return learn(
            base,
            plan.concepts,
            common.store,
            plan.adapter,
            plan.settings,
            resume=resume,
            restart=restart,
            progress=report,
            warn=note,
        )


def _tell(common: Common, plan: _Plan, learned: Sequence[Version]) -> None:
    from cpserve.manifest import SAMPLES

    version = common.store.version(plan.adapter)
    ref = str(version)
    samples = [path for path in version.paths() if path.startswith(f"{SAMPLES}/")]
    store = ["--store", str(common.root)] if common.root else []
    here = [*(["--adapter", plan.adapter] if plan.adapter != "default" else []), *store]
    token = version.manifest.concepts[-1].token
    draw = " ".join([f'cpserve generate "a photo of {token}"', *map(shlex.quote, here)])
    look = shlex.join(["cpserve", "adapters", "checkout", ref, ref.replace("@", "-"), *store])
    value = {
        "version": ref,
        "learned": [{"concept": each.manifest.concepts[-1].name, "version": str(each)} for each in learned],
        "concepts": [c.token for c in version.manifest.concepts],
        "samples": samples,
        "next": draw,
    }
    lines = [f"{each}  learned {each.manifest.concepts[-1].name}" for each in learned] or [
        f"{ref}  nothing was left to learn"
    ]
    lines += [f"samples: {len(samples)} pictures lie in the version; to see them: {look}", f"next: {draw}"]
    emit(value, "\n".join(lines), as_json=common.json)
