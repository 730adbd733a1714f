"""Opens a file's bytes: decompressed, and in UTF-8 whatever its encoding."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from ensemble.errors import InvalidInput

PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
HEAD_BYTES = 1 << 20


@contextmanager
def opened(path: Path, encoding: str | None) -> Iterator[Any]:
    """Opens `path` as a stream of UTF-8 bytes; InvalidInput for an encoding that nobody knows."""
    name = encoding_of(path, encoding)
    with pa.input_stream(str(path), compression=PACKED.get(path.suffix.lower())) as raw:
        if name in ("utf-8", "ascii"):
            yield raw
        else:
            with pa.transcoding_input_stream(raw, name, "utf-8") as stream:
                yield stream


def encoding_of(path: Path, encoding: str | None) -> str:
    """Gives the name of the file's encoding: the one that shop.toml says, else what its first bytes mark."""
    if encoding is not None:
        try:
            return codecs.lookup(encoding).name
        except LookupError:
            raise InvalidInput(
                f'{path}: encoding = {encoding!r} is unknown; write "utf-8", "latin-1", "cp1252", "utf-16", …'
            ) from None
    first = head(path, 4)
    return next((name for mark, name in _BOMS if first.startswith(mark)), "utf-8")


def head(path: Path, size: int = HEAD_BYTES) -> bytes:
    """Reads the first bytes of a file, decompressed."""
    with pa.input_stream(str(path), compression=PACKED.get(path.suffix.lower())) as stream:
        data: bytes = stream.read(size)
    return data


def not_utf8(path: Path) -> InvalidInput | None:
    """Makes the error for the first line of a file that is no UTF-8; None where all are."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with pa.input_stream(str(path), compression=PACKED.get(path.suffix.lower())) as stream:
        while data := stream.read(HEAD_BYTES):
            held = decoder.getstate()[0]
            try:
                decoder.decode(data)
            except UnicodeDecodeError as error:
                both = held + data
                line += both[: error.start].count(b"\n")
                byte = both[error.start] if error.start < len(both) else 0
                return InvalidInput(
                    f"{path}: line {line} is no UTF-8 (byte 0x{byte:02x}); save the file as UTF-8, or "
                    f"name its "
                    'encoding in shop.toml beside file = "…": encoding = "latin-1" (or "cp1252", …)'
                )
            line += data.count(b"\n") - held.count(b"\n")
    return None
