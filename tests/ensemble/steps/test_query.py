"""A query is read one request at a time: what is wrong with it is said in a line, and only rows that say or
show something are encoded."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ensemble.errors import InvalidArgument
from ensemble.local import column_of
from ensemble.options import default_options
from ensemble.steps.query import ImageQuery, TextQuery, check_query, pictures_of, texts_of


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (24, 16), **more: object) -> bytes:
    rng, out = np.random.default_rng(0), io.BytesIO()
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65535, (size[1], size[0])).astype(np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(out, kind, **more)
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few bytes."""
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = lambda name, data: (  # noqa: E731
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def animation() -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:])
    return out.getvalue()


def gif() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "GIF")
    return out.getvalue()


FAULTS = [
    (b"no picture at all", "query_image: is no JPEG, PNG or WebP"),
    (gif(), "query_image: is no JPEG, PNG or WebP"),
    (picture("JPEG")[:200], "query_image: is corrupt: "),
    (picture("PNG")[:-40], "query_image: is corrupt: "),
    (bomb(), "query_image: has more than 50 megapixels"),
    (animation(), "query_image: is animated, 2 frames"),
    (b"\xff" * 4_000_001, "query_image: at most 4,000,000 bytes, got 4,000,001"),
]


@pytest.mark.parametrize(("data", "message"), FAULTS)
def test_a_picture_that_cannot_be_encoded_is_said_in_one_line(data, message):
    with pytest.raises(InvalidArgument) as raised:
        pictures_of(column_of([b"", data]), 32)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "data", [picture("JPEG", "CMYK"), picture("PNG", "I;16"), picture("WEBP"), picture("PNG", "LA")]
)
def test_unusual_pictures_are_read(data):
    pixels = pictures_of(column_of([data]), 32)[0, 0]
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), np.float32)
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_a_photo_is_turned_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image, out = Image.new("RGB", (32, 32), "white"), io.BytesIO()
    image.paste("black", (0, 0, 32, 16))
    image.save(out, "JPEG", exif=exif.tobytes())
    pixels = pictures_of(column_of([out.getvalue()]), 32)[0, 0]
    assert pixels[:, 2].mean() > 0.9 > 0.1 > pixels[:, -2].mean()


def test_pictures_of_a_request_are_limited_in_number_and_size():
    with pytest.raises(InvalidArgument, match=r"at most 8 pictures, 6 MiB in all, got 9 of 0.0 MiB"):
        pictures_of(column_of([picture()] * 9), 32)
    with pytest.raises(InvalidArgument, match=r"got 2 of 7.2 MiB"):
        pictures_of(column_of([b"\xff" * 3_800_000] * 2), 32)


def test_texts_are_read_as_people_send_them():
    said = ["  matte\0berry ", "مكياج وردي", "口紅", "💄", "x" * 2_000]
    assert texts_of(column_of([text.encode() for text in said])) == [
        "matte berry", "مكياج وردي", "口紅", "💄", "x" * 2_000,
    ]  # fmt: skip
    with pytest.raises(InvalidArgument, match="query_text: at most 2,000 bytes, got 2,001"):
        texts_of(column_of([b"x" * 2_001]))
    with pytest.raises(InvalidArgument, match="query_text: must be UTF-8, got b'"):
        texts_of(column_of([b"\xff\xfe"]))


@pytest.mark.parametrize("text", [b"", b" \0 \n"])
def test_a_query_of_nothing_is_refused(text):
    tensors = {"query_text": column_of([text]), "query_image": column_of([b""])}
    with pytest.raises(InvalidArgument, match="query_text: it is empty, and so is query_image; give a text"):
        check_query(default_options(1), tensors)


def test_only_rows_that_say_or_show_something_are_encoded(pictured_release):
    models = pictured_release.pipelines["search"]
    text, image = (
        TextQuery(models.model("text_query"), pictured_release),
        ImageQuery(models.model("image_query"), pictured_release),
    )
    options, texts = default_options(5), [b"berry", b"", b"", b"matte lipstick", b""]
    read = text.read(options, query_text=column_of(texts))
    words = text.run(options, **read)["query_words"]
    assert text.num_encoded == 2
    assert words.any(axis=1).tolist() == [True, False, False, True, False]
    pictures = column_of([b"", picture("JPEG"), b"", b"", b""])
    look = image.run(options, **image.read(options, query_image=pictures))["query_look"]
    assert image.num_encoded == 1
    assert look.any(axis=1).tolist() == [False, True, False, False, False]
    alone = image.run(default_options(1), **image.read(options, query_image=pictures[1:2]))["query_look"]
    np.testing.assert_allclose(alone[0], look[1], atol=1e-5)
    assert text.metrics()[0].value == 2
