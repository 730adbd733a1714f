"""Makes small pictures of a shop's items, to stand beside their titles in a page that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from builders.shop.columns.ids import known_ids
from builders.shop.shop_toml import Entities, FeatureColumn, open_shop
from builders.shop.tables import read_table
from ensemble.arrays import Array
from ensemble.content.pictures import MAX_BYTES, PictureFaultError, pixels_from_picture
from ensemble.errors import InvalidInput
from ensemble.live.catalogue import last_entries, log_folder, open_catalogue
from ensemble.live.pictures import is_logged, read_picture
from ensemble.release.ids import IdMap

SIDE = 56  # pixels of the longer side
MOST_BYTES = 2_000_000  # of all pictures of a page, as they are written into it
_QUALITY = 75
_TURNED = range(5, 9)  # EXIF's orientations that swap width and height
_ORIENTATION = 0x0112


@dataclass
class Thumbnails:
    """Holds the items' pictures as JPEG in base64, and how many have none."""

    by_item: dict[bytes, str] = field(default_factory=dict)
    without: int = 0  # items that name no picture
    missing: int = 0  # their file is not there, or is none that can be read
    too_many: int = 0  # beyond MOST_BYTES

    def note(self) -> str:
        """Says in a sentence how many there are, and what the others lack."""
        lacking = {
            "name none": self.without,
            "name one that is missing or cannot be read": self.missing,
            f"are beyond the {MOST_BYTES / 1e6:g} MB of a page": self.too_many,
        }
        total = len(self.by_item) + sum(lacking.values())
        others = "".join(f"; {count} {words}" for words, count in lacking.items() if count)
        return f"Pictures of {len(self.by_item)} of the {total} items{others}."


def thumbnails(folder: Path, items: Sequence[bytes], home: Path) -> Thumbnails:
    """Makes the pictures of `items` in their order: of the shop's files, and of the catalogue log in `home`.

    InvalidInput where the shop's items have no image feature, or their file cannot be read.
    """
    shop = open_shop(folder)
    entry = shop.items
    feature = next((one for one in entry.features if one.kind == "image"), None) if entry else None
    if entry is None or feature is None:
        raise InvalidInput(
            f"--shop {folder}: its items have no feature of kind image", "leave --shop out, or name one"
        )
    found, used = Thumbnails(), 0
    for item, name in zip(items, _names(folder, entry, feature, items, home), strict=True):
        data = _bytes_of(folder, home, name)
        text = base64.b64encode(thumbnail(data)).decode() if data else ""
        if not name:
            found.without += 1
        elif not text:
            found.missing += 1
        elif used + len(text) > MOST_BYTES:
            found.too_many += 1
        else:
            found.by_item[item], used = text, used + len(text)
    return found


def _names(
    folder: Path, entry: Entities, feature: FeatureColumn, items: Sequence[bytes], home: Path
) -> Iterator[str]:
    """Gives what each item says of its picture: a path in the shop, a picture of the log, or nothing."""
    columns = read_table(folder, entry.file, [entry.id, feature.source], entry.reading)
    ids, index = known_ids(columns[entry.id])
    file_rows = np.zeros(len(ids) + 1, np.int64)
    file_rows[index + 1] = np.arange(len(index))
    places = IdMap(ids).rows_from_ids(np.array(items, "S")) if len(items) else np.zeros(0, np.int64)
    changed, values = _changed(home, feature.source), columns[feature.source].values
    for item, place in zip(items, places.tolist(), strict=True):
        if item.decode() in changed:
            yield changed[item.decode()]
        else:
            yield str(values[int(file_rows[place])].as_py() or "") if place else ""


def _changed(home: Path, column: str) -> Mapping[str, str]:
    """Gives what the catalogue's log says of items' pictures, by id."""
    reader = open_catalogue(home)
    entries = last_entries(reader).values() if reader is not None else ()
    return {one.item_id: str(one.values[column] or "") for one in entries if column in one.values}


def _bytes_of(folder: Path, home: Path, name: str) -> bytes:
    """Reads a picture's file; empty where it is not there, or is larger than any that is read."""
    if is_logged(name):
        return read_picture(log_folder(home), name)
    path = folder / name
    try:
        return path.read_bytes() if name and path.stat().st_size <= MAX_BYTES else b""
    except OSError:
        return b""


def thumbnail(data: bytes) -> bytes:
    """Gives a picture's file as a small JPEG of the same shape; empty where it cannot be read."""
    try:
        pixels: Array = pixels_from_picture(data, SIDE)
    except PictureFaultError:
        return b""
    with Image.open(io.BytesIO(data)) as file:
        width, height = file.size
        if file.getexif().get(_ORIENTATION) in _TURNED:
            width, height = height, width
    square = Image.fromarray((pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8))
    longer, out = max(width, height), io.BytesIO()
    shape = tuple(max(1, round(SIDE * one / longer)) for one in (width, height))
    square.resize((shape[0], shape[1])).save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
