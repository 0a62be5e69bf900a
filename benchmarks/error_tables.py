"""Tables of a picture's errors under every label and draw, measured once, and what each way of judging makes of them.

`Published` is the reference, the adaptive evaluation of Li et al. ("Your Diffusion Model is Secretly a Zero-Shot Classifier",
ICCV 2023, algorithm 2 and section 3.3): timesteps evenly spaced over the whole schedule, one noise a timestep, fresh for each
picture and shared by all labels; every label sees `first` of the draws, spread over the schedule, the `keep` best see the
rest, the smallest mean squared error wins. The authors' settings: 50, 500, 5 for CIFAR-10 and 25, 250, 5 for Pets. Their
published commands for some data sets take absolute errors instead of squares, so both are kept.

A lever's table holds the error maps of every label, and of c_0, under all of `cpserve.score.draws` over the whole schedule, both
signs of the noise apart: what a judge would have seen who drew fewer, elsewhere, or without opposite noise is a part of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cpserve.elimination import Odds, Race
from cpserve.engine import Engine
from cpserve.prompts import Prompt
from cpserve.recognition import ROWS, Judging, latents_of, middle_first
from cpserve.score import Draw, draws

BINS, RESAMPLED = 15, 10_000
Curve = list[tuple[float, float]]
"""(UNet evaluations a picture, accuracy), by rising evaluations."""


@dataclass(frozen=True, eq=False)
class Labels:
    """What stands for each label on an engine: a bank of K,V and a slot `[L]` of it a label."""

    engine: Engine
    bank: Tensor
    slots: Tensor

    @classmethod
    def of(cls, engine: Engine, prompts: Sequence[Prompt]) -> Labels:
        return cls(engine, *engine.bank.packed(prompts))

    @torch.no_grad()
    def off(self, latent: Tensor, draw: Draw) -> Tensor:
        """By how much the noise is mispredicted, `[D,L,4,h,w]`, of latents `[4,h,w]` under every label and draw."""
        cells = torch.cartesian_prod(torch.arange(len(draw.t)), torch.arange(len(self.slots)))
        parts = []
        for which, label in (part.unbind(1) for part in cells.split(ROWS)):
            t, noise = draw.t[which], draw.noise[which]
            xt = self.engine.spec.schedule.add_noise(latent.expand_as(noise), noise, t)
            parts.append((noise - self.engine.denoise(xt, t, self.bank, self.slots[label])).cpu())
        return torch.cat(parts).unflatten(0, (len(draw.t), len(self.slots)))

    def maps(self, latent: Tensor, draw: Draw) -> np.ndarray:
        """Squared errors `[D,L,h,w]`, summed over channels."""
        made: np.ndarray = self.off(latent, draw).pow(2).sum(2).numpy()
        return made

    def errors(self, latent: Tensor, draw: Draw) -> np.ndarray:
        """Squared and absolute errors `[D,L,2]`, summed over elements."""
        off = self.off(latent, draw).flatten(2)
        made: np.ndarray = torch.stack([off.pow(2).sum(2), off.abs().sum(2)], 2).numpy()
        return made


@dataclass(frozen=True, kw_only=True)
class Published:
    """The reference: every label sees `first` draws, the `keep` best of them all `total`; `first` divides `total`."""

    first: int = 50
    total: int = 500
    keep: int = 5

    @property
    def stage_one(self) -> np.ndarray:
        """Which of the `total` draws every label sees."""
        return _spread(np.arange(self.total), self.first)

    @property
    def stage_two(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self.total), self.stage_one)

    def evaluations(self, labels: int) -> int:
        return self.first * labels + (self.total - self.first) * min(self.keep, labels)

    def draws(self, seed: int, shape: Sequence[int], length: int) -> Draw:
        step, generator = length // self.total, torch.Generator().manual_seed(seed)
        t = torch.arange(step // 2, length, step)[: self.total].float()
        return Draw(t, torch.randn(self.total, *shape, generator=generator))

    def errors(self, labels: Labels, image: Image.Image) -> np.ndarray:
        """`[total,L,2]` float32 of one picture, which the noise belongs to; NaN where a label was dropped after stage one."""
        latent = latents_of(labels.engine, [image])[0]
        draw = self.draws(zlib.crc32(image.tobytes()), latent.shape, labels.engine.spec.schedule.steps)
        made = np.full((self.total, len(labels.slots), 2), np.nan, np.float32)
        first, rest = self.stage_one, self.stage_two
        made[first] = labels.errors(latent, Draw(draw.t[first], draw.noise[first]))
        kept = np.sort(made[first, :, 0].mean(0, dtype=np.float64).argsort(kind="stable")[: self.keep])
        some = Labels(labels.engine, labels.bank, labels.slots[kept])
        if len(rest):
            made[np.ix_(rest, kept)] = some.errors(latent, Draw(draw.t[rest], draw.noise[rest]))
        return made

    def label(self, errors: np.ndarray) -> np.ndarray:
        """`[P]` from squared or absolute errors `[P,total,L]`: the smallest mean among the labels that saw all draws."""
        mean = errors.mean(1, dtype=np.float64)  # NaN where one is
        return np.nan_to_num(mean, nan=np.inf).argmin(1)

    def curve(self, errors: np.ndarray, truth: np.ndarray) -> Curve:
        """The same with fewer draws: in stage one only, and with a part of stage two."""
        points, labels, first, rest = [], errors.shape[2], self.stage_one, self.stage_two
        for n in sorted({n for n in (1, 2, 5, 10, 25, self.first) if n <= self.first}):
            mean = errors[:, _spread(first, n)].mean(1, dtype=np.float64)
            points.append((float(n * labels), accuracy(mean.argmin(1), truth)))
        for part in (9, 4, 2, 1):
            seen = np.concatenate([first, rest[::part]])
            spent = self.first * labels + len(rest[::part]) * min(self.keep, labels)
            points.append((float(spent), accuracy(self.label(errors[:, seen]), truth)))
        return points


def _spread(of: np.ndarray, count: int) -> np.ndarray:
    """`count` of the entries, evenly spaced, as the authors choose their timesteps."""
    step = len(of) // count
    return of[step // 2 :: step][:count]


def accuracy(label: np.ndarray, truth: np.ndarray) -> float:
    return round(float((label == truth).mean()), 4)


@dataclass(frozen=True, eq=False)
class Levers:
    """`maps [P,pairs,2,L+1,h,w]` of squared errors, c_0 the last label, under both signs of the noise at `t [pairs]`, a share of
    the schedule; `truth [P]`; `elements` of a latent.
    """

    maps: np.ndarray
    t: np.ndarray
    truth: np.ndarray
    elements: int

    DEALS = 10
    """Ways to choose the draws that a row's figures are means of."""

    @staticmethod
    def measure(labels: Labels, seed: int, pairs: int, image: Image.Image) -> np.ndarray:
        """One picture's maps `[pairs,2,L+1,h,w]` float32."""
        latent = latents_of(labels.engine, [image])[0]
        draw = draws(seed, pairs, tuple(latent.shape), 0, labels.engine.spec.schedule.steps)
        return in_pairs(labels.maps(latent, draw))

    @cached_property
    def errors(self) -> np.ndarray:
        """`[P,pairs,2,L]`, of the known labels."""
        made: np.ndarray = self.maps[:, :, :, :-1].sum((-1, -2))
        return made

    @staticmethod
    def timesteps(seed: int, pairs: int, length: int) -> np.ndarray:
        """`t` of the draws that `measure` takes, as shares of the schedule."""
        return draws(seed, pairs, (1, 1, 1), 0, length).t[::2].numpy() / length

    def rows(self, judging: Judging) -> dict[str, Curve]:
        """Each lever on top of the one before, at several numbers of draws."""
        everywhere = np.arange(len(self.t))
        window = np.flatnonzero((self.t >= judging.low) & (self.t < judging.high))
        labels = self.errors.shape[-1]
        made: dict[str, Curve] = {}
        for n in (n for n in (2, 4, 8, 16, 32) if n <= 2 * len(window)):
            looks = n // 2
            few = 2 * n <= len(self.t)  # else any choice is nearly the same
            dealt = {
                "each label its own draws": [self._unpaired(n, deal) for deal in range(self.DEALS if few else 0)],
                "the same draws for all labels": [self._single(d) for d in self._random(n) if few],
                "spread timesteps": [self._single(d) for d in self._spread(everywhere, n)],
                f"t in {judging.low:g}-{judging.high:g}": [self._single(d) for d in self._spread(window, n)],
                "opposite noise": [self._paired(d).mean(1).argmin(1) for d in self._spread(window, looks)],
            }
            for name, found in dealt.items():
                if found:
                    right = float(np.mean([accuracy(label, self.truth) for label in found]))
                    made.setdefault(name, []).append((float(n * labels), round(right, 4)))
            races: dict[str, list[tuple[float, float]]] = {}
            for chosen in self._spread(window, looks):
                for name, (seen, how) in self._seen(chosen, judging).items():
                    races.setdefault(name, []).append(self._raced(seen, how))
            for name, run in races.items():
                spent, right = (round(float(np.mean(part)), 4) for part in zip(*run, strict=True))
                made.setdefault(name, []).append((spent, right))
        return made

    def _unpaired(self, n: int, deal: int) -> np.ndarray:
        rng, (count, pairs, _, labels) = np.random.default_rng((5, deal)), self.errors.shape
        own = np.stack([rng.permutation(2 * pairs)[:n] for _ in range(labels)], 1)  # [n,L]
        return self.errors.reshape(count, 2 * pairs, labels)[:, own, np.arange(labels)].mean(1).argmin(1)

    def _random(self, n: int) -> list[np.ndarray]:
        pairs = len(self.t)
        return [np.random.default_rng((6, deal)).permutation(pairs)[:n] for deal in range(self.DEALS)]

    def _spread(self, among: np.ndarray, n: int) -> list[np.ndarray]:
        """Runs of van der Corput's sequence, each starting elsewhere in it: any of them is spread evenly."""
        starts = np.linspace(0, len(among), self.DEALS, endpoint=False).astype(int)
        return [np.roll(among, -start)[:n] for start in dict.fromkeys(starts.tolist())] if n <= len(among) else []

    def _single(self, chosen: np.ndarray) -> np.ndarray:
        return self.errors[:, chosen, 0].mean(1).argmin(1)

    def _paired(self, chosen: np.ndarray) -> np.ndarray:
        """The mean of both signs of the noise: `[P,looks,L]` float64."""
        return self.errors[:, chosen].mean(2, dtype=np.float64)

    def _seen(self, chosen: np.ndarray, judging: Judging) -> dict[str, tuple[np.ndarray, Judging]]:
        """What a race is shown of the chosen pairs, `[P,looks,L+1,h,w]`, and how it judges, by lever."""
        maps, all_go_on = self.maps[:, chosen], replace(judging, kept=0)
        turned = in_turn(maps, self.t[chosen], judging.middle)
        return {
            f"elimination at {judging.error:g}": (maps.mean(2), replace(judging, whole=True)),
            "by region": (in_a_row(maps), all_go_on),
            "the middle first": (turned, all_go_on),
            f"at most {judging.kept} go on": (turned, judging),
        }

    def _raced(self, looks: np.ndarray, judging: Judging) -> tuple[float, float]:
        """Evaluations a picture and accuracy with elimination."""
        races = [raced(one, self.elements, judging) for one in looks]
        right = accuracy(np.array([race.label for race in races]), self.truth)
        return float(np.mean([race.evaluations for race in races])), right


def in_pairs(maps: np.ndarray) -> np.ndarray:
    """`[D,...]` as `[pairs,2,...]`: draws of one timestep and opposite noise stand beside each other."""
    return maps.reshape(-1, 2, *maps.shape[1:])


def in_turn(maps: np.ndarray, t: np.ndarray, middle: float) -> np.ndarray:
    """Maps `[P,pairs,2,...]` at `t [pairs]` as `[P,D,...]`, in the order in which `classify` sees them."""
    return in_a_row(maps)[:, middle_first(torch.from_numpy(t), middle).numpy()]


def in_a_row(maps: np.ndarray) -> np.ndarray:
    """Maps `[P,pairs,2,...]` as `[P,D,...]`, pair after pair."""
    return maps.reshape(len(maps), -1, *maps.shape[3:])


def raced(looks: np.ndarray, elements: int, judging: Judging, odds: Odds | None = None) -> Race:
    """What `classify` makes of a picture's error maps `[looks,L+1,h,w]`, c_0 the last label; by the whole picture a look is the
    mean of a pair.
    """
    error, whole = judging.error, judging.whole
    kept, none = (0, False) if whole else (judging.kept if error else 0, judging.none)
    race = Race(looks.shape[1] - 1, elements, error=error, kept=kept, none=none, whole=whole, odds=odds or Odds())
    for look in looks:
        if race.over:
            break
        race.see(look[:-1][race.active], None if whole else look[-1], 2 if whole else 1)
    return race


def found_at(share: float, fitted: np.ndarray, known: np.ndarray, never: np.ndarray) -> tuple[float, float]:
    """False alarms among known pictures and what is found of the others, at the score that `share` of the fitted ones exceed."""
    threshold = np.quantile(fitted, 1 - share, method="higher")
    return float((known > threshold).mean()), float((never > threshold).mean())


def calibration_error(p: np.ndarray, was_right: np.ndarray) -> float:
    """Expected calibration error: over bins of equal width, the distance of mean probability and share right, by pictures."""
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    parts = [(np.sum(bins == b), abs(p[bins == b].mean() - was_right[bins == b].mean())) for b in np.unique(bins)]
    return round(float(sum(n * off for n, off in parts) / len(p)), 4)


def interval(values: np.ndarray) -> list[float]:
    """Of their mean, 95 %, drawing them again (Efron's bootstrap)."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLED, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975)).round(4).tolist()
    return [low, high]
