"""Makes the call of a search: a text, a picture, both, or items that the list shall be like."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from clients.errors import InvalidArgument
from clients.wire import Call, call_from_options
from ensemble.content.pictures import MAX_BYTES
from ensemble.contract import MAX_TEXT_BYTES, SEARCH
from ensemble.options import Id

Picture: TypeAlias = bytes | str | os.PathLike[str]  # the file's bytes, or where it lies


def call_of_search(
    user_id: Id,
    text: str,
    image: Picture | None,
    options: Mapping[str, Any],
    budget_ms: float | None,
    request_id: str | None = None,
) -> Call:
    """Encodes a search as a Call; InvalidArgument for what no server takes."""
    if not isinstance(text, str):
        raise InvalidArgument(f"query_text: must be text, got {type(text).__name__}")
    said, shown = text.encode("utf-8", "replace"), picture_of(image)
    if len(said) > MAX_TEXT_BYTES:
        raise InvalidArgument(f"query_text: at most {MAX_TEXT_BYTES:,} bytes, got {len(said):,}")
    call = call_from_options([user_id], options, budget_ms, per_user=False, request_id=request_id)
    return replace(call, model=SEARCH, contents=(("query_text", said), ("query_image", shown)))


def picture_of(image: Picture | None) -> bytes:
    """Gives a picture's file; InvalidArgument where it cannot be read, or is larger than a server takes."""
    if image is None:
        return b""
    if isinstance(image, bytes | bytearray | memoryview):
        data = bytes(image)
    elif isinstance(image, str | os.PathLike):
        try:
            data = Path(image).read_bytes()
        except OSError as error:
            raise InvalidArgument(f"query_image: cannot read {image}: {error.strerror}") from None
    else:
        raise InvalidArgument(f"query_image: must be a file's bytes or its path, got {type(image).__name__}")
    if len(data) > MAX_BYTES:
        raise InvalidArgument(
            f"query_image: at most {MAX_BYTES:,} bytes, got {len(data):,}", "send a smaller picture"
        )
    if not data:
        raise InvalidArgument("query_image: the picture is empty", "leave it out to search by text")
    return data
