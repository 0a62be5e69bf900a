"""What a sequence is compared with: all concepts' pictures learned at once, in one set of factors, each with its own token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cpserve.adapter import Adapter, empty_adapter
from cpserve.base import BaseModel
from cpserve.concept import Concept
from cpserve.manifest import Manifest
from cpserve.prompts import tokenize
from trainer import Record, Settings
from trainer.images import encode_concept
from trainer.loop import Stage, Task, optimise, prepare
from trainer.lora import start_token, trainable
from trainer.sequence import check_new


class Joint(Task):
    """`latents` and `ids` hold all concepts' in order, equally many of each; `earlier` are the first tokens, learned as well."""

    def losses(self, step: int) -> Iterator[Tensor]:
        """As in a sequence, on pictures of any concept under a wording of its own."""
        generator, batch = self.generator(step), self.settings.batch
        rows = torch.randint(len(self.latents), (batch,), generator=generator)
        wording = torch.randint(self.templates, (batch,), generator=generator)
        each = len(self.latents) * self.templates // len(self.ids)  # latents of one concept
        slot = rows // each * self.templates + wording
        return self._losses(self.latents[rows], slot, torch.full((batch,), 1 / batch), generator)


def learn_jointly(base: BaseModel, concepts: Sequence[Concept], settings: Settings, folder: Path) -> Adapter:
    """As many steps as the concepts would take one after another."""
    start = empty_adapter(base.spec.entry, "joint")
    entries = [check_new(base, start, concept) for concept in concepts]
    tokens = [entry.token for entry in entries]
    texts = [wording.format(entry.token) for entry in entries for wording in entry.templates]
    rows = torch.stack([start_token(base, concept.class_word, settings.seed + j) for j, concept in enumerate(concepts)])
    model = trainable(base, start, rows[-1], settings.rank, settings.seed, None, fresh=True)
    earlier = nn.Parameter(rows[:-1])
    latents = torch.cat(
        [
            encode_concept(base, concept, settings.variants, settings.seed, mirror=settings.mirror)
            for concept in concepts
        ]
    )
    task = Joint(
        base,
        settings,
        latents,
        tokenize(base.spec.tokenizer, texts, tokens),
        earlier,
        model,
        templates=len(entries[0].templates),
        captions=torch.full((len(latents),), -1),
    )
    prepare(base)
    groups = [({"earlier": earlier, "token": model.token}, settings.token_rate), (model.factors, settings.factor_rate)]
    steps = settings.steps * len(concepts)
    folder.mkdir(parents=True, exist_ok=True)
    optimise(
        Stage("learn", task.losses, groups, steps, settings.warm_up, 0, steps, nothing=task.nothing), Record(folder)
    )
    manifest = Manifest(base=base.spec.entry, concepts=tuple(entries), method="joint", settings=settings.dump())
    learned = [*earlier.detach(), model.token.detach()]
    return Adapter(manifest, model.lora(), {token: row.clone() for token, row in zip(tokens, learned, strict=True)})
