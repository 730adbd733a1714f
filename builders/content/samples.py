"""Keeps some of the texts and pictures that were encoded, beside the data, for whoever makes an encoder
smaller: the shop's own files are out of reach by then."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

SAMPLES = "samples.zip"  # of the data stage: FEATURE/NUMBER
MOST = 384  # of a feature


def write_samples(samples: Mapping[str, Sequence[bytes]], folder: Path) -> None:
    """Writes samples by feature: texts as UTF-8, pictures as the bytes of their files."""
    with zipfile.ZipFile(folder / SAMPLES, "w") as file:
        for feature, inputs in samples.items():
            for at, data in enumerate(inputs):
                file.writestr(zipfile.ZipInfo(f"{quote(feature, safe='')}/{at:04}"), data)


def read_samples(folder: Path, feature: str) -> list[bytes]:
    """Reads the samples of one feature; none where there are none."""
    if not (folder / SAMPLES).is_file():
        return []
    start = f"{quote(feature, safe='')}/"
    with zipfile.ZipFile(folder / SAMPLES) as file:
        return [file.read(name) for name in file.namelist() if name.startswith(start)]
