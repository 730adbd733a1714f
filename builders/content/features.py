"""Encodes the content features of a shop's items, and says what could not be encoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from builders.content.cache import KeptEncoder, keep_encoder, key_of_text
from builders.content.contents import Content, Contents
from builders.content.samples import MOST
from builders.content.sources import MODELS, encoded_features, sources_of
from builders.progress import Progress
from builders.shop.columns.categories import lists_from_column, texts_from_column
from builders.shop.columns.column import Column
from builders.shop.shop_toml import FeatureColumn
from ensemble.arrays import Array
from ensemble.content.encoder import Encoded
from ensemble.content.projection import fitted_projection
from ensemble.live.pictures import LOGGED, picture_path
from ensemble.release.files import file_sha256

CACHE = "encoded"  # the folder of kept vectors, beside the stages'
WIDTH = (
    128  # components of a content vector that an item's row holds, unless the feature's width says another
)
_FRAMES = 16  # of a video: more take as many times longer, and change its mean little
_NAMED = 3  # inputs of a kind of fault that are named


def encode_contents(
    features: list[FeatureColumn],
    columns: Mapping[str, Column],
    *,
    shop: Path,
    catalogue: Path,
    cache: Path,
    threads: int,
    progress: Progress,
) -> Contents:
    """Encodes each content feature of the items' `columns`, whose pictures lie in the shop's folder, or,
    where the log brought them, beside the file `catalogue`."""
    contents = Contents()
    sources = sources_of(features, shop)
    kept: dict[str, KeptEncoder] = {}
    for model, source in sorted(sources.items()):
        progress(0.0, f"{source.name}: exported once, then kept")
        kept[model] = keep_encoder(source, cache)
    contents.encoders = list(kept.values())
    for feature in encoded_features(features):
        model = MODELS[feature.kind]
        inputs = inputs_of(feature, columns[feature.source], shop, catalogue)

        def told(at: int, of: int, name: str = feature.name) -> None:
            progress(at / of, f"{name}: {at:,} of {of:,} new ones")

        encoded = kept[model].encoded(inputs.keys, inputs.read, threads, told)
        good = np.ones(len(inputs.keys) + 1, bool)  # the last stands for "no key"
        good[[*encoded.faults, -1]] = False
        vectors = np.concatenate([encoded.vectors, np.zeros((1, encoded.vectors.shape[1]), np.float32)])
        whole, there = (vectors[inputs.places], good[inputs.places])
        learned = encoded.vectors[good[:-1]]
        if isinstance(inputs, Frames):
            whole, there = inputs.pooled(whole, there)
            learned = whole[there]
        projection = fitted_projection(learned, feature.width or WIDTH)
        values = projection.values(whole, there)
        contents.by_feature[feature.name] = Content(model, values)
        contents.projections[feature.name] = projection
        contents.samples[feature.name] = _samples(inputs, np.flatnonzero(good[:-1]))
        contents.lines.append(_line(feature.name, inputs, encoded))
    return contents


def inputs_of(feature: FeatureColumn, column: Column, shop: Path, catalogue: Path) -> Texts | Pictures:
    """Gives what a feature's encoder reads of a column of the items."""
    if feature.kind == "video":
        return Frames(column, feature.separator, shop, catalogue)
    texts = texts_from_column(column).to_pylist()
    cells = np.array([text or "" for text in texts], dtype=object)
    return Texts(cells) if feature.kind == "text" else Pictures(cells, shop, catalogue)


def _samples(inputs: Texts | Pictures, places: Array) -> list[bytes]:
    """Draws some of the inputs at `places` [n]."""
    drawn = np.random.default_rng(0).choice(places, min(MOST, len(places)), replace=False)
    read = inputs.read(np.sort(drawn).tolist())
    return [one if isinstance(one, bytes) else one.encode("utf-8", "replace") for one in read]


class Texts:
    """Gives distinct texts, each by its key; places [n] int64 says which of them each row has."""

    def __init__(self, cells: Array) -> None:
        self.texts, self.places = np.unique(cells.astype(str), return_inverse=True)
        self.keys = [key_of_text(text) for text in self.texts]
        self.absent: dict[str, int] = {}
        self.named: dict[str, list[str]] = {}

    def read(self, places: list[int]) -> list[str]:
        return [str(self.texts[at]) for at in places]

    def name(self, at: int) -> str:
        return str(self.texts[at])[:40].strip("\0 \t\r\n")


class Pictures:
    """Gives distinct pictures, each by its file's digest; places [n] int64, -1 where there is no file."""

    def __init__(self, cells: Array, shop: Path, catalogue: Path) -> None:
        names, of_row = np.unique(cells.astype(str), return_inverse=True)
        self.named: dict[str, list[str]] = {"missing": []}
        self.files: dict[str, Path] = {}  # by digest
        of_name: list[str] = []
        for name in names.tolist():
            path = picture_path(catalogue.parent, name) if name.startswith(LOGGED) else shop / name
            if name and path.is_file():
                of_name.append(file_sha256(path))
                self.files.setdefault(of_name[-1], path)
            else:
                of_name.append("")
                self.named["missing"].append(name)
        self.keys = list(self.files)
        place = {key: at for at, key in enumerate(self.keys)}
        self.places = np.array([place.get(key, -1) for key in of_name], np.int64)[of_row]
        empty = int((cells == "").sum())
        self.absent = {"empty": empty, "missing": int((self.places < 0).sum()) - empty}

    def read(self, places: list[int]) -> list[bytes]:
        return [self.files[self.keys[at]].read_bytes() for at in places]

    def name(self, at: int) -> str:
        return self.files[self.keys[at]].name


class Frames(Pictures):
    """Gives distinct frames of videos, each cell a list of files; places [m] are the frames', one video after
    the other, and of a long one those that are evenly spaced."""

    def __init__(self, column: Column, separator: str | None, shop: Path, catalogue: Path) -> None:
        owners, names = lists_from_column(column, separator)
        self.num_rows = len(column.values)
        kept = _spaced(owners)
        self.owners = owners[kept]
        super().__init__(np.array(names.to_pylist(), dtype=object)[kept], shop, catalogue)

    def pooled(self, vectors: Array, there: Array) -> tuple[Array, Array]:
        """Makes frames' vectors [m, V], which are `there` [m] bool, each video's mean, of length 1: [n, V],
        and which videos have one [n] bool."""
        out = np.zeros((self.num_rows, vectors.shape[1]), np.float32)
        np.add.at(out, self.owners[there], vectors[there])
        lengths = np.linalg.norm(out, axis=1, keepdims=True)
        return out / np.maximum(lengths, 1e-9), lengths[:, 0] > 0


def _spaced(owners: Array) -> Array:
    """Gives the places of at most _FRAMES entries of each owner [m] int64 ascending, evenly spaced."""
    _, starts, counts = np.unique(owners, return_index=True, return_counts=True)
    parts = [
        start + np.unique(np.linspace(0, count - 1, min(count, _FRAMES)).round().astype(np.int64))
        for start, count in zip(starts, counts, strict=True)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _line(feature: str, inputs: Texts | Pictures, encoded: Encoded) -> str:
    """Says how many rows have a vector, and counts and names the inputs that have none, by kind."""
    counts, named = Counter(inputs.absent), {kind: list(names) for kind, names in inputs.named.items()}
    rows = np.bincount(inputs.places[inputs.places >= 0], minlength=len(inputs.keys))
    for at, (kind, _) in sorted(encoded.faults.items()):
        counts[kind] += int(rows[at])
        named.setdefault(kind, []).append(inputs.name(at))
    total, what = len(inputs.places), "frames" if isinstance(inputs, Frames) else "items"
    parts = [
        f"{count:,} {kind}{_some(named.get(kind, []))}" for kind, count in sorted(counts.items()) if count
    ]
    without = f"; without: {', '.join(parts)}" if parts else ""
    return f"{feature}: {total - sum(counts.values()):,} of {total:,} {what} encoded{without}"


def _some(names: Sequence[str]) -> str:
    """Names the first few; an empty name says nothing."""
    shown = [name for name in names if name][:_NAMED]
    more = len([name for name in names if name]) - len(shown)
    return f" ({', '.join(shown)}{f' and {more} more' if more else ''})" if shown else ""
