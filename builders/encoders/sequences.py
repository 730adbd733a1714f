"""Lays users' item sequences out in the two shapes models see: packed rows to train on, windows to serve.

Axes: U users, R packed rows, H history.
"""

from dataclasses import dataclass, fields

import numpy as np

from ensemble.arrays import Array


@dataclass(frozen=True)
class Sequences:
    """Holds users' item rows >= 1 in time order (CSR): user u has rows[offsets[u] : offsets[u + 1]]."""

    offsets: Array
    rows: Array
    # [len(rows)] int64, the cell of each event (ensemble/release/events.py); None: nothing is known of them
    cells: Array | None = None


@dataclass(frozen=True)
class PackedRows:
    """Holds training windows end to end; id 0 is an empty place, target 0 one without a next item."""

    items: Array  # [R, H] int64
    targets: Array  # [R, H] int64
    segments: Array  # [R, H] int64: places see earlier places of their own segment
    users: Array  # [R, H] int64
    cells: Array  # [R, H] int64, of the events of `items`; 0 adds nothing

    def take(self, rows: Array) -> "PackedRows":
        """Gives some of the rows: rows [n] int64."""
        return PackedRows(*(getattr(self, entry.name)[rows] for entry in fields(self)))

    def windows(self) -> tuple[Array, Array, Array]:
        """Gives each filled place's left-padded window: row [P], places [P, H] int64, inside [P, H] bool."""
        row, place = np.nonzero(self.items > 0)
        length = self.items.shape[1]
        back = place[:, None] - np.arange(length - 1, -1, -1)
        places = np.maximum(back, 0)
        return (
            row,
            places,
            (back >= 0) & (self.segments[row[:, None], places] == self.segments[row, place][:, None]),
        )


def pack_sequences(sequences: Sequences, order: Array, length: int) -> PackedRows:
    """Lays the users' training windows end to end in rows of `length` places, so that hardly any place is
    padding.

    order [n] int64 are the users to take. A sequence longer than a row is cut from its newest end.
    """
    starts, counts = sequences.offsets[order], np.diff(sequences.offsets)[order] - 1
    pieces = np.maximum(-(-counts // length), 0)
    owner = np.repeat(np.arange(len(order)), pieces)
    back = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    ends = starts[owner] + counts[owner] - back * length
    begins = np.maximum(ends - length, starts[owner])
    sizes = ends - begins
    places, used = np.empty(len(sizes), np.int64), 0
    for piece, size in enumerate(sizes.tolist()):
        used += -used % length if used % length + size > length else 0
        places[piece] = used
        used += size
    inside = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    to, source = np.repeat(places, sizes) + inside, np.repeat(begins, sizes) + inside
    out = np.zeros((5, -(-used // length) * length), np.int64)
    out[:, to] = (
        sequences.rows[source],
        sequences.rows[source + 1],
        np.repeat(np.arange(len(sizes)) + 1, sizes),
        np.repeat(order[owner], sizes),
        np.zeros_like(source) if sequences.cells is None else sequences.cells[source],
    )
    return PackedRows(*out.reshape(5, -1, length))


def windows(sequences: Sequences, users: Array, length: int) -> Array:
    """Gives the newest `length` items of users [n] int64, left padded with 0: [n, length] int64."""
    return _windows(sequences.rows, sequences.offsets, users, length)


def cell_windows(sequences: Sequences, users: Array, length: int) -> Array:
    """Gives the cells of the newest `length` events of users [n] int64, left padded with 0, which adds
    nothing: [n, length] int64."""
    if sequences.cells is None:
        return np.zeros((len(users), length), np.int64)
    return _windows(sequences.cells, sequences.offsets, users, length)


def _windows(values: Array, offsets: Array, users: Array, length: int) -> Array:
    places = offsets[users + 1][:, None] - length + np.arange(length)
    known = places >= offsets[users][:, None]
    return (
        np.where(known, values[np.where(known, places, 0)], 0)
        if len(values)
        else np.zeros(known.shape, np.int64)
    )
