"""Pictures as shops have them: what can be decoded is, and all else is named, with its kind."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ensemble.content.pictures import PictureFaultError, pixels_from_picture


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def plain(
    mode: str = "RGB", size: tuple[int, int] = (40, 20), colour: object = (200, 100, 50)
) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


def png_that_says(width: int, height: int) -> bytes:
    """A few bytes whose header says how large they are."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 10)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_pixels_are_the_pictures(form):
    pixels = pixels_from_picture(saved(plain(), form), 32)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels.mean((1, 2)) * 255, (200, 100, 50), atol=3)


def test_odd_modes_keep_their_colours():
    np.testing.assert_allclose(
        pixels_from_picture(saved(plain("CMYK", colour=(0, 255, 255, 0)), "JPEG"), 32).mean((1, 2)),
        (1, 0, 0),
        atol=0.03,
    )
    deep = Image.fromarray(np.full((8, 8), 32_896, np.uint16))  # half of 16 bits: Pillow alone makes it white
    np.testing.assert_allclose(pixels_from_picture(saved(deep), 32), 128 / 255, atol=0.01)
    np.testing.assert_allclose(pixels_from_picture(saved(plain("RGBA", colour=(0, 0, 0, 0))), 32), 1)
    np.testing.assert_allclose(pixels_from_picture(saved(plain("L", colour=51)), 32), 0.2, atol=0.01)


def test_a_camera_held_upright_is_honoured():
    image = plain(size=(40, 20))
    image.paste((0, 0, 0), (0, 0, 20, 20))  # its left half is black
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: left becomes top
    pixels = pixels_from_picture(saved(image, "JPEG", exif=exif, quality=95), 32)
    assert pixels[0, :12].mean() < 0.1 < 0.6 < pixels[0, -12:].mean()


WHOLE = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
MOVING = saved(plain(), "WEBP", save_all=True, append_images=[plain(colour=(0, 0, 0))], duration=100)


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (b"", "empty", "is empty"),
        (b"\0\1\2 no picture", "another format", "is no JPEG, PNG or WebP"),
        (saved(plain(), "GIF"), "another format", "is no JPEG, PNG or WebP"),
        (WHOLE[: len(WHOLE) // 2], "corrupt", "is corrupt: "),
        (WHOLE[:30], "corrupt", "is corrupt: "),
        (saved(plain())[:-30], "corrupt", "is corrupt: "),
        (png_that_says(9_000, 8_000), "too large", "has 9,000 x 8,000 pixels, more than 50 megapixels"),
        (png_that_says(60_000, 60_000), "too large", "has more than 50 megapixels"),
        (MOVING, "animated", "is animated, 2 frames"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_decoded_is_named(data, kind, text):
    with pytest.raises(PictureFaultError) as caught:
        pixels_from_picture(data, 32)
    assert caught.value.kind == kind
    assert str(caught.value).startswith(text)
