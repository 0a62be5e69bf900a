"""A picture as the bytes of a PNG file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo


def png(image: Image.Image, info: PngInfo | None = None) -> bytes:
    """The file's bytes, with `info` inside."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
