"""Lists the files that a shop consists of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from builders.shop.shop_toml import PICTURED, SHOP_FILE, Shop, open_shop


def shop_files(folder: Path) -> list[Path]:
    """Gives shop.toml and all files that it names, sorted; InvalidInput for a shop.toml that is wrong.

    A column of images names its files one by one in a table. Rather than read the table, all files below the
    shop's folder count if there is such a column.
    """
    shop = open_shop(folder)
    tables = [
        shop.interactions.file,
        *(entry.file for entry in (shop.items, shop.users) if entry is not None),
    ]
    named = [folder / SHOP_FILE, folder / (shop.interactions.planted or "")]
    for file in (*tables, *shop.split.files):
        named += _below(folder / file) if (folder / file).is_dir() else [folder / file]
    return sorted({*filter(Path.is_file, named), *(_below(folder) if _has_images(shop) else ())})


def _has_images(shop: Shop) -> bool:
    entries = [entry for entry in (shop.items, shop.users) if entry is not None]
    return any(feature.kind in PICTURED for entry in entries for feature in entry.features)


def _below(folder: Path) -> Iterator[Path]:
    """Gives the files below a folder, behind links to folders too, but for hidden ones."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in files if not name.startswith("."))
