"""Keeps what was encoded, by content: a build encodes only what no build of this shop has met.

A folder beside the stages' folders holds, for each state of an encoder, its ONNX model and a database of
vectors by the digest of what they are of. Each batch is one transaction: a killed build goes on behind its
last one, and two builds at once may share it.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from builders.content.sources import Source
from builders.folders import link, only_one
from ensemble import contract
from ensemble.arrays import Array, Tensors
from ensemble.content.encoder import TOKENIZER, ContentEncoder, Encoded, EncoderFacts, read_facts
from ensemble.contract import TEXT
from ensemble.engines import open_engine
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.release.files import write_durably
from ensemble.schema import EncoderSizes

if TYPE_CHECKING:
    from builders.content.opened import Opened

_AT_ONCE = 128  # inputs of one transaction
_ASKED = 500  # keys of one query
_ONNX = "model.onnx"


@dataclass(frozen=True)
class KeptEncoder:
    """Holds an encoder's exported model and facts in its folder of the cache."""

    folder: Path
    facts: EncoderFacts

    @property
    def sizes(self) -> EncoderSizes:
        """Gives what the contract has to know of it."""
        return EncoderSizes(self.facts.model, self.facts.width, self.facts.side)

    def link_into(self, folder: Path) -> None:
        """Puts what a release has of the encoder into a folder."""
        link(self.folder / _ONNX, folder / "engines" / self.facts.model / _ONNX)
        link(self.folder / "facts.json", folder / f"{self.facts.model}.json")
        if self.facts.model == TEXT:
            link(self.folder / TOKENIZER, folder / TOKENIZER)

    def open(self, threads: int) -> ContentEncoder:
        """Opens it for encoding."""
        tokenizer = self.folder / TOKENIZER if self.facts.model == TEXT else None
        return ContentEncoder(open_engine(self.folder / _ONNX, threads), self.facts, tokenizer)

    def encoded(
        self,
        keys: Sequence[str],
        read: Callable[[list[int]], list[str] | list[bytes]],
        threads: int,
        progress: Callable[[int, int], None],
    ) -> Encoded:
        """Gives the vectors of distinct keys [n]; encodes, and keeps, those that are not kept yet.

        read gives the texts or the files' bytes at some places of `keys`.
        """  # fmt: skip
        with contextlib.closing(_open_database(self.folder / "vectors.db")) as database:
            vectors = np.zeros((len(keys), self.facts.width), np.float32)
            faults: dict[int, tuple[str, str]] = {}
            missing = _look_up(database, keys, vectors, faults)
            opened = self.open(threads) if missing else None
            for start in range(0, len(missing), _AT_ONCE):
                progress(start, len(missing))
                part = missing[start : start + _AT_ONCE]
                assert opened is not None
                new = opened.encode(read(part))
                vectors[part] = new.vectors
                faults |= {part[at]: fault for at, fault in new.faults.items()}
                _keep(database, [keys[at] for at in part], new)
            return Encoded(vectors, faults)


def keep_encoder(source: Source, root: Path) -> KeptEncoder:
    """Gives the encoder's folder in the cache below `root`; exports the encoder where that is not done."""
    folder = root / f"{source.model}-{source.digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(root / f".{folder.name}.lock", lambda: None):
        if not (folder / "facts.json").is_file():
            _export(source, folder)
    return KeptEncoder(folder, read_facts(folder / "facts.json"))


def _export(source: Source, folder: Path) -> None:
    """Writes model.onnx, held against torch, the tokenizer, and last the facts."""
    from builders.content.models import open_source
    from builders.content.tokenizer import copy_tokenizer
    from builders.export.onnx_export import export_alone

    opened = open_source(source)
    facts = EncoderFacts(
        source.model, source.name, source.digest, opened.width, opened.max_tokens, opened.side, opened.space
    )
    if source.model == TEXT:
        copy_tokenizer(source, opened, folder)
    model = contract.content_encoder(EncoderSizes(facts.model, facts.width, facts.side))
    temporary = folder / f".{_ONNX}"
    try:
        export_alone(opened.module, model, temporary, _samples(facts, opened))
    except PeregrineError:
        raise
    except Exception as error:  # of torch's exporter, about a module that it cannot follow
        text = " ".join(str(error).split())[:200]
        raise InvalidInput(f"encoder {source.name!r} cannot be exported as ONNX: {text}") from None
    temporary.rename(folder / _ONNX)
    write_durably(folder / "facts.json", facts.to_json())


def _samples(facts: EncoderFacts, opened: Opened) -> Tensors:
    """Makes inputs on which the export is held against torch: texts of several lengths, or noisy pixels."""
    rng = np.random.default_rng(0)
    if facts.model == TEXT:
        length = min(16, facts.max_tokens)
        lengths = rng.integers(2, length + 1, 6)
        ids = rng.integers(1, opened.vocabulary, (6, length))
        mask = np.arange(length) < lengths[:, None]
        return {"token_ids": np.where(mask, ids, 0), "token_mask": mask}
    return {"pixels": rng.random((3, 3, facts.side, facts.side), np.float32)}


def key_of_text(text: str) -> str:
    """Gives the key of a text."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


# --- the database


def _open_database(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=60, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute(
        "CREATE TABLE IF NOT EXISTS vectors (key TEXT PRIMARY KEY, vector BLOB, kind TEXT, fault TEXT)"
        " WITHOUT ROWID"
    )
    return database


def _look_up(
    database: sqlite3.Connection, keys: Sequence[str], vectors: Array, faults: dict[int, tuple[str, str]]
) -> list[int]:
    """Fills in what is kept, and gives the places [m] of the keys that are not."""
    places = {key: at for at, key in enumerate(keys)}
    missing = set(range(len(keys)))
    for key, vector, kind, fault in _rows(database, keys):
        at = places[key]
        if vector is None:
            faults[at] = kind, fault
        elif len(vector) != vectors.shape[1] * 4:
            continue
        else:
            vectors[at] = np.frombuffer(vector, np.float32)
        missing.discard(at)
    return sorted(missing)


def _rows(database: sqlite3.Connection, keys: Sequence[str]) -> Iterator[tuple[str, bytes | None, str, str]]:
    for start in range(0, len(keys), _ASKED):
        part = list(keys[start : start + _ASKED])
        marks = ",".join("?" * len(part))
        yield from database.execute(
            f"SELECT key, vector, kind, fault FROM vectors WHERE key IN ({marks})", part
        )


def _keep(database: sqlite3.Connection, keys: Iterable[str], new: Encoded) -> None:
    """Writes one batch, whole or not at all."""
    rows = [
        (key, None, *new.faults[at]) if at in new.faults else (key, new.vectors[at].tobytes(), "", "")
        for at, key in enumerate(keys)
    ]
    database.execute("BEGIN IMMEDIATE")
    database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?)", rows)
    database.execute("COMMIT")
