"""Writes and reads manifest.json, which lists what a release is and carries its own digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensemble.errors import ReleaseError
from ensemble.json_text import json_text

MANIFEST = "manifest.json"
FORMAT = 2
_NO_DIGEST = "0" * 64
# The last entry. It is the digest of the file's bytes with zeros in its place, so that no bit can change
# unnoticed, in a name or between two entries either.
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"\n\}\n\Z')
_CURE = "build the release again, or copy it again"


def content_id(manifest: Mapping[str, Any]) -> str:
    """Digests what a manifest lists, [path, sha256] by path; when it was built is no part of it."""
    listed = sorted((path, entry["sha256"]) for path, entry in manifest.get("files", {}).items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def sealed(manifest: Mapping[str, Any]) -> str:
    """Gives the text of manifest.json: these entries with `format`, `id` and the digest of the whole."""
    entries = {**manifest, "format": FORMAT, "id": content_id(manifest), "digest": _NO_DIGEST}
    entries["digest"] = entries.pop("digest")  # to the end, should `manifest` have been read from a file
    text = json_text(entries, indent=1) + "\n"
    return text.replace(f'"digest": "{_NO_DIGEST}"', f'"digest": "{_digest(text.encode())}"')


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a manifest.json; ReleaseError if it is none of ours, was changed, or cannot be read.

    FileNotFoundError is left to the caller, who knows what else there is.
    """
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ReleaseError(f"cannot read {path}: {error}", _CURE) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files", {}), dict):
        raise ReleaseError(f"{path} is not a manifest", "build the release again")
    if manifest.get("format") != FORMAT:
        raise ReleaseError(
            f"{path}: format {manifest.get('format')} is not {FORMAT}, which this Peregrine reads",
            "build the release again",
        )
    if (match := _DIGEST.search(data)) is None or match[1].decode() != _digest(data):
        raise ReleaseError(f"{path} was changed: it does not fit its own digest", _CURE)
    if manifest.get("id") != content_id(manifest):
        raise ReleaseError(f"{path}: its list of files does not fit its id", _CURE)
    return {"files": {}, **manifest}


def _digest(data: bytes) -> str:
    """Digests the bytes of a manifest with zeros where its digest stands."""
    match = _DIGEST.search(data)
    if match is not None:
        data = data[: match.start(1)] + _NO_DIGEST.encode() + data[match.end(1) :]
    return hashlib.sha256(data).hexdigest()
