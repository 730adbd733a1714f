"""Reads pictures as bytes: what is no picture that can be encoded is named, and never ends a batch."""

from __future__ import annotations

import io
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble.arrays import Array

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 50_000_000  # a few kB of PNG can say that they are gigabytes of pixels
MAX_BYTES = 4_000_000  # of a picture that comes with a change or a request
FORMATS = ("JPEG", "PNG", "WEBP")


class PictureFaultError(ValueError):
    """Says in `kind`, one word or two, and in its text why a picture cannot be encoded."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def pixels_from_picture(data: bytes, side: int) -> Array:
    """Decodes JPEG, PNG or WebP as pixels [3, side, side] float32 from 0 to 1, red, green and blue.

    The whole picture is squeezed into the square: what a shop shows reaches to the edges. EXIF orientation is
    honoured, transparency lies on white. PictureFaultError for what is corrupt, animated, of another format,
    or has more than MAX_PIXELS.
    """
    from PIL import Image, ImageOps

    if not data:
        raise PictureFaultError("empty", "is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are refused below
            file = Image.open(io.BytesIO(data), formats=FORMATS)
            _check(file)
            file.draft("RGB", (side, side))  # a large JPEG is decoded at an eighth of its size
            squeezed = _rgb(ImageOps.exif_transpose(file)).resize(
                (side, side), Image.Resampling.BICUBIC, reducing_gap=2.0
            )
    except PictureFaultError:
        raise
    except Image.DecompressionBombError:
        raise PictureFaultError("too large", f"has more than {MAX_PIXELS // 10**6} megapixels") from None
    except Image.UnidentifiedImageError:
        raise PictureFaultError("another format", "is no JPEG, PNG or WebP") from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        MemoryError,
        zlib.error,
        KeyError,
        IndexError,
    ) as error:
        text = " ".join(str(error).split())[:120]
        raise PictureFaultError("corrupt", f"is corrupt: {text or type(error).__name__}") from None
    return np.ascontiguousarray(np.asarray(squeezed, np.float32).transpose(2, 0, 1) / 255)


def _check(image: Any) -> None:
    """Refuses, by the file's header, what is too large or moves."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureFaultError(
            "too large", f"has {width:,} x {height:,} pixels, more than {MAX_PIXELS // 10**6} megapixels"
        )
    if getattr(image, "n_frames", 1) > 1:
        raise PictureFaultError("animated", f"is animated, {image.n_frames} frames")


def _rgb(image: Image) -> Image:
    """Gives a picture of any mode as RGB: 16 bits become 8, transparency lies on white."""
    from PIL import Image

    if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        white = Image.new("RGBA", whole.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, whole).convert("RGB")
    return image.convert("RGB")
