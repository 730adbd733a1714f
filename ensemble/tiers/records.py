"""Packs one row as bytes, as it stands in Redis under a key, and in L1. A header says whose row it is.

    feat:<version>:u:<identity>   a user's record      feat:<version>:i:<identity>   an item's record
    feat:<version>:n:<item id>    the item's row number, for writers that have no id map
    feat:<version>:meta           the release's schema and digest, for writers without a release folder
    feat:shop:<shop>              a hash {release: version}: the pointers that readers follow

A record may have a tail: the times that writers need to put late events in their place. Readers cut it off.
"""

from __future__ import annotations

import binascii
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ensemble import contract
from ensemble.arrays import Array
from ensemble.release.release import Release
from ensemble.release.snapshot import item_dtype, user_dtype
from ensemble.schema import Schema

TABLES = ("users", "items")
_LETTER = {"users": b"u", "items": b"i"}
_MAGIC = 0x31574F52  # "ROW1", above it the record's size
_HEADER = [
    ("magic", "<u8"),
    ("digest", "<u8"),
    ("identity", "<u8", (2,)),
    ("written_s", "<f8"),
    ("partial", "<u8"),
]
# written_s: wall clock, for people. partial: 1 where a writer found no row to add events to; the snapshot's
# row, if any, goes before it.
_HEX = 32  # letters of an identity in a key
# Rows behind the release's own that a past may name: items added while they are served; `features` knows how
# many there are
_LIVE_ITEMS = 1 << 24


def release_digest(release: Release) -> int:
    """Gives 64 bits that change with anything a row's meaning hangs on: tensors, item numbering, learned
    vectors."""
    files = release.manifest.get("files", {})
    parts = [
        files.get(f"{release.name}/{name}", {}).get("sha256", "")
        for name in ("item_ids.npy", "items.npy", "users.npy")
    ]
    text = json.dumps([contract.fingerprint(release.schema), release.schema.to_json(), *parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def user_identities(ids: Array) -> Array:
    """Gives 128 bits of BLAKE2b of ids [B] S: [B, 2] uint64.

    They stand for the id everywhere, so that no id is readable in Redis.
    """
    raw = b"".join([hashlib.blake2b(i, digest_size=16).digest() for i in ids.tolist()])
    return np.frombuffer(raw, np.uint64).reshape(-1, 2)


def item_identities(rows: Array) -> Array:
    """Gives the identities [n, 2] uint64 of item rows [n] int64, which begin at 1."""
    out = np.zeros((len(rows), 2), np.uint64)
    out[:, 0] = rows
    return out


def shop_key(shop: str) -> bytes:
    """Gives the key of the hash {release: version}."""
    return b"feat:shop:" + shop.encode()


def prefix(version: bytes, table: str) -> bytes:
    """Gives what the keys of a table's rows begin with."""
    return b"feat:%s:%s:" % (version, _LETTER[table])


def name_key(version: bytes, item_id: bytes) -> bytes:
    """Gives the key of an item's row number."""
    return b"feat:%s:n:%s" % (version, item_id)


def meta_key(version: bytes) -> bytes:
    """Gives the key of what a writer must know of a version."""
    return b"feat:%s:meta" % version


def keys_from_identities(start: bytes, identities: Array) -> list[bytes]:
    """Gives n keys that begin with `start` for identities [n, 2] uint64."""
    text = binascii.hexlify(identities.tobytes())
    return [start + text[at : at + _HEX] for at in range(0, len(text), _HEX)]


def identities_from_keys(keys: list[bytes]) -> Array:
    """Gives the identities [n, 2] uint64 of keys that are known to be rows'."""
    return np.frombuffer(binascii.unhexlify(b"".join([key[-_HEX:] for key in keys])), np.uint64).reshape(
        -1, 2
    )


@dataclass(frozen=True)
class RowFormat:
    """Packs and checks the rows of one table of one release."""

    table: str  # users or items
    schema: Schema
    digest: int
    num_items: int  # the release's own

    @cached_property
    def row(self) -> np.dtype:
        """Gives the snapshot's dtype."""
        return user_dtype(self.schema) if self.table == "users" else item_dtype(self.schema)

    @cached_property
    def record(self) -> np.dtype:
        """Gives the dtype of a header and a row."""
        return np.dtype([*_HEADER, ("row", self.row)])

    @cached_property
    def _magic(self) -> int:
        """Gives the first word of a good record: what it is, and its size."""
        return _MAGIC | self.record.itemsize << 32

    @property
    def times(self) -> int:
        """Counts the float64 times of a tail: of each item of a past, or of each 4-byte word of an item's
        row.

        -inf means as loaded.
        """
        return self.schema.sizes.seen if self.table == "users" else self.row.itemsize // 4

    def pack(self, identities: Array, rows: Array, written_s: float, partial: bool = False) -> Array:
        """Packs identities [n, 2] and rows [n] into records [n]."""
        out = np.zeros(len(rows), self.record)
        out["magic"], out["digest"] = self._magic, self.digest
        out["identity"], out["row"], out["written_s"], out["partial"] = identities, rows, written_s, partial
        return out

    def unpack(self, values: list[Any], identities: Array) -> tuple[Array, Array, dict[str, int]]:
        """Reads what Redis said of `identities` [n, 2].

        Gives records [n] (garbage where not good), good [n] bool, and {cause: count} of bad ones.
        """
        width = self.record.itemsize
        lengths = [len(value) if type(value) is bytes else -1 for value in values]
        if min(lengths) == max(lengths) == width:
            raw = b"".join(values)
        else:
            blank = bytes(width)
            raw = b"".join(
                [
                    value[:width] if length >= width else blank
                    for value, length in zip(values, lengths, strict=True)
                ]
            )
        records = np.frombuffer(raw, self.record)
        ours, current = records["magic"] == self._magic, records["digest"] == self.digest
        right = (records["identity"] == identities).all(axis=1)
        good = ours & right & current
        sound = self._sound(records["row"])
        if good.all() and sound.all():
            return records, good, {}
        there = np.array([value is not None for value in values], bool)
        causes = {
            "malformed": there & ~ours,
            "wrong_id": ours & ~right,
            "wrong_schema": ours & right & ~current,
            "out_of_range": good & ~sound,
        }
        return records, good & sound, {cause: int(bad.sum()) for cause, bad in causes.items() if bad.any()}

    def tail(self, value: bytes) -> Array:
        """Reads the times [times] behind a good record; -inf where there are none."""
        tail = value[self.record.itemsize :][: 8 * self.times]
        return (
            np.frombuffer(tail, np.float64).copy()
            if len(tail) == 8 * self.times
            else np.full(self.times, -np.inf)
        )

    def _sound(self, rows: Array) -> Array:
        """Says of rows [n] whose numbers are finite and whose codes and items exist: [n] bool.

        Another would fail an engine, or leak into others' lists.
        """
        sound = np.ones(len(rows), bool)
        table = self.schema.users if self.table == "users" else self.schema.items
        limits = {"codes": (0, table.num_codes - 1), "seen": (-1, self.num_items + _LIVE_ITEMS)}
        for name in self.row.names or ():
            field = rows[name]
            if name in limits:
                low, high = limits[name]
                sound &= (field >= low).all(axis=1) & (field <= high).all(axis=1)
            else:
                sound &= np.isfinite(field).all(axis=1)
        return sound


def row_format(release: Release, table: str) -> RowFormat:
    """Gives the format of one of TABLES in `release`."""
    return RowFormat(table, release.schema, release_digest(release), len(release.item_ids))
