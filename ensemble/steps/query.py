"""Steps text_query and image_query: turn what a query says or shows into the vectors that its items have.

Each reads one request at a time, so that a picture that cannot be read is that request's error and no
batch-mate's; then it encodes the rows that have something, and only those. Tokens and pixels stay within the
step: 600 kB of pixels a picture would otherwise go through shared memory, for rows without a picture, too.
"""

from __future__ import annotations

import numpy as np

from ensemble.arrays import Array, Tensors
from ensemble.content.encoder import ContentEncoder, open_content_encoder
from ensemble.content.pictures import MAX_BYTES, PictureFaultError, pixels_from_picture
from ensemble.contract import IMAGE, MAX_PICTURES, MAX_PICTURES_BYTES, MAX_TEXT_BYTES, TEXT
from ensemble.errors import InvalidArgument
from ensemble.options import Options
from ensemble.spec import ModelSpec
from ensemble.steps.served import ServedRelease
from ensemble.telemetry import Metric

_CHECKED_SIDE = 32  # pixels: a picture is decoded to see whether it can be
_NOTHING = "query_text: it is empty, and so is query_image"


def texts_of(query_text: Array) -> list[str]:
    """Gives the texts of query_text [B, 1] bytes without space around them; InvalidArgument for one that is
    too long or no UTF-8. A NUL is a space."""
    texts = []
    for value in query_text[:, 0].tolist():
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
        if len(data) > MAX_TEXT_BYTES:
            raise InvalidArgument(
                f"query_text: at most {MAX_TEXT_BYTES:,} bytes, got {len(data):,}", "shorten it"
            )
        try:
            texts.append(data.decode().replace("\0", " ").strip())
        except UnicodeDecodeError:
            raise InvalidArgument(f"query_text: must be UTF-8, got {data[:20]!r}") from None
    return texts


def pictures_of(query_image: Array, side: int) -> Array:
    """Decodes query_image [B, 1] bytes: [B, 1] object, pixels [3, side, side] float32 or None where there is
    no picture; InvalidArgument for one that cannot be encoded, and where there are too many."""
    files = [value if isinstance(value, bytes) else b"" for value in query_image[:, 0].tolist()]
    count, size = sum(map(bool, files)), sum(map(len, files))
    for data in files:
        if len(data) > MAX_BYTES:
            raise InvalidArgument(
                f"query_image: at most {MAX_BYTES:,} bytes, got {len(data):,}", "send a smaller picture"
            )
    if count > MAX_PICTURES or size > MAX_PICTURES_BYTES:
        raise InvalidArgument(
            f"query_image: a request has at most {MAX_PICTURES} pictures, {MAX_PICTURES_BYTES >> 20} MiB in "
            f"all, got {count} of {size / 2**20:.1f} MiB",
            "send more requests",
        )
    out = np.full((len(files), 1), None, object)
    for row, data in enumerate(files):
        if data:
            try:
                out[row, 0] = pixels_from_picture(data, side)
            except PictureFaultError as fault:
                raise InvalidArgument(f"query_image: {fault}") from None
    return out


def refuse_nothing(options: Options, has_text: Array, has_image: Array) -> None:
    """Raises InvalidArgument for a user [B] who neither types nor shows anything, nor names an item."""
    asks = has_text | has_image | np.array([bool(user.like) for user in options.users], bool)
    if not asks.all():
        raise InvalidArgument(_NOTHING, "give a text, a picture, or both")


def check_query(options: Options, tensors: Tensors) -> None:
    """Raises InvalidArgument for a request that the steps of a search would refuse."""
    texts, pictures = texts_of(tensors["query_text"]), pictures_of(tensors["query_image"], _CHECKED_SIDE)
    has_image = np.array([one is not None for one in pictures[:, 0]], bool)
    refuse_nothing(options, np.array(list(map(bool, texts)), bool), has_image)


class _Query:
    """Holds a release's encoder of one kind, where it has one."""

    def __init__(self, release: ServedRelease, model: str) -> None:
        known = {encoder.model for encoder in release.schema.encoders}
        self.release = release.name
        self.encoder: ContentEncoder | None = None
        if model in known:
            self.encoder = open_content_encoder(release, release.model(model))
        self.width = self.encoder.facts.width if self.encoder else 1
        self.num_encoded = 0

    def metrics(self) -> list[Metric]:
        """Says how many rows were encoded; all others had nothing to encode."""
        return [Metric("peregrine_query_encoded_rows", (), float(self.num_encoded), is_counter=True)]


class TextQuery(_Query):
    """Encodes what is typed; a release without a text_encoder finds it by its words alone."""

    def __init__(self, model: ModelSpec, release: ServedRelease) -> None:
        super().__init__(release, TEXT)

    def read(self, options: Options, *, query_text: Array, **others: Array) -> Tensors:
        """Reads one request's texts: [b, 1] object, str."""
        out = np.empty((len(query_text), 1), object)
        out[:, 0] = texts_of(query_text)
        return {"query_text": out}

    def run(self, options: Options, *, query_text: Array) -> Tensors:
        """Encodes texts [B, 1] -> query_words [B, V], 0 where there is none."""
        out = np.zeros((len(query_text), self.width), np.float32)
        texts = query_text[:, 0].tolist()
        rows = [row for row, text in enumerate(texts) if text]
        if rows and self.encoder is not None:
            out[rows] = self.encoder.encode([str(texts[row]) for row in rows]).vectors
            self.num_encoded += len(rows)
        return {"query_words": out}


class ImageQuery(_Query):
    """Decodes and encodes what is shown."""

    def __init__(self, model: ModelSpec, release: ServedRelease) -> None:
        super().__init__(release, IMAGE)

    def read(self, options: Options, *, query_image: Array, **others: Array) -> Tensors:
        """Decodes one request's pictures: [b, 1] object, pixels or None."""
        if self.encoder is None:
            if any(query_image[:, 0].tolist()):
                raise InvalidArgument(
                    f"query_image: release {self.release} has no image_encoder",
                    "search by text, or build with an image feature that has an encoder",
                )
            return {"query_image": np.full((len(query_image), 1), None, object)}
        return {"query_image": pictures_of(query_image, self.encoder.facts.side)}

    def run(self, options: Options, *, query_image: Array) -> Tensors:
        """Encodes pixels [B, 1] object -> query_look [B, Z], 0 where there is no picture."""
        out = np.zeros((len(query_image), self.width), np.float32)
        rows = [row for row, one in enumerate(query_image[:, 0]) if isinstance(one, np.ndarray)]
        if rows and self.encoder is not None:
            out[rows] = self.encoder.of_pixels([query_image[row, 0] for row in rows])
            self.num_encoded += len(rows)
        return {"query_look": out}
