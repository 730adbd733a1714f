"""Keeps the route: which releases `recommend` answers with, and the share of users that each one has.

<home>/.route.json is the truth about what is served; the home is the repository, or the folder that several
servers share. One release has all users most of the time. While there are two, users are split by a salted
hash of their id: the same user gets the same release everywhere, and keeps it when the newcomer's share
grows.
"""

from __future__ import annotations

import dataclasses
import datetime
import getpass
import hashlib
import json
import math
import os
import platform
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release.files import write_durably
from ensemble.release.names import NAME

FILE = ".route.json"
MOST = 2  # releases at once: one, and one that is tried
_FORMAT = 1
_CURE = "restore it, or remove it: then the alias, recommend/config.pbtxt, says which release is active"


@dataclass(frozen=True)
class Share:
    """Says which share of users a release answers, above 0 and at most 1."""

    release: str
    share: float


@dataclass(frozen=True)
class Route:
    """Says which releases answer whom: the main release first, then the one that is tried, if any."""

    shares: tuple[Share, ...]
    salt: str  # of the hash that splits users; another one at each canary, so that not always the same are it
    sequence: int  # 1 for a repository's first route, then one more at each change
    since: str = ""  # when it was written, ISO 8601 in UTC
    by: str = ""  # who wrote it

    def __post_init__(self) -> None:
        names, parts = self.releases, [one.share for one in self.shares]
        if not 1 <= len(names) <= MOST or len(set(names)) < len(names):
            got = ", ".join(names) or "none"
            raise InvalidInput(f"a route has 1 to {MOST} releases, each once, got {got}")
        if wrong := next((name for name in names if not NAME.fullmatch(name)), None):
            raise InvalidInput(f"a route's release is a name such as r7, got {wrong!r}")
        if not all(0 < part <= 1 for part in parts) or not math.isclose(sum(parts), 1, abs_tol=1e-6):
            raise InvalidInput(f"a route's shares are above 0 and 1 together, got {parts}")
        if self.sequence < 1:
            raise InvalidInput(f"a route's sequence is a whole number from 1, got {self.sequence}")

    @property
    def releases(self) -> tuple[str, ...]:
        """Names its releases, the main one first."""
        return tuple(one.release for one in self.shares)

    @property
    def main(self) -> str:
        """Names the release that answers whoever no other release answers."""
        return self.shares[0].release

    @property
    def canary(self) -> Share | None:
        """Gives the release that is tried, with its share; None while there is one release."""
        return self.shares[1] if len(self.shares) > 1 else None

    def share(self, release: str) -> float:
        """Gives a release's share of users; 0 for one that is not in the route."""
        return next((one.share for one in self.shares if one.release == release), 0.0)

    def places(self, user_ids: Sequence[bytes]) -> Array:
        """Says for B users who answers them: [B] int64, places in `releases`.

        A canary has those whose hash lies below its share, so that a larger share keeps them all. Whoever has
        no id is the main release's: one id of many people is no sample.
        """
        canary = self.canary
        if canary is None:
            return np.zeros(len(user_ids), np.int64)
        named = np.fromiter(map(len, user_ids), np.int64, len(user_ids)) > 0
        return ((user_hashes(user_ids, self.salt) < canary.share) & named).astype(np.int64)

    def to_json(self) -> str:
        """Writes the content of .route.json."""
        releases = [dataclasses.asdict(one) for one in self.shares]
        rest = {"salt": self.salt, "sequence": self.sequence, "since": self.since, "by": self.by}
        return json.dumps({"format": _FORMAT, "releases": releases, **rest}, indent=1) + "\n"


def user_hashes(user_ids: Sequence[bytes], salt: str) -> Array:
    """Hashes B users' ids to numbers in [0, 1): [B] float64, by BLAKE2b (RFC 7693) of salt, NUL and id.

    It is the same in every process, on every machine and in every version of Python. (A salt in front takes
    half the time of BLAKE2b's own key.)
    """
    start = salt.encode() + b"\0"
    digests = b"".join([hashlib.blake2b(start + one, digest_size=8).digest() for one in user_ids])
    return (np.frombuffer(digests, "<u8") >> np.uint64(11)) * 2.0**-53


def next_route(previous: Route | None, shares: Sequence[Share], by: str = "") -> Route:
    """Makes the route that follows `previous`. While a canary's share changes its users stay the same ones; a
    canary that begins draws others."""
    begins = previous is None or previous.canary is None
    salt = secrets.token_hex(8) if previous is None or (begins and len(shares) > 1) else previous.salt
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Route(tuple(shares), salt, previous.sequence + 1 if previous else 1, since, by or _who())


def _who() -> str:
    """Names this process's user and machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without an entry in the password file
        user = f"uid {os.getuid()}"
    return f"{user}@{platform.node()}"


def route_from_json(text: str, where: str) -> Route:
    """Reads what to_json() wrote, and entries that later versions may add; ReleaseError names `where`."""
    try:
        entries: dict[str, Any] = json.loads(text)
        if entries["format"] != _FORMAT:
            raise ValueError(f"format {entries['format']} is not {_FORMAT}, which this Peregrine reads")
        shares = tuple(Share(str(one["release"]), float(one["share"])) for one in entries["releases"])
        since, by = str(entries.get("since", "")), str(entries.get("by", ""))
        return Route(shares, str(entries["salt"]), int(entries["sequence"]), since, by)
    except KeyError as error:
        raise ReleaseError(f"{where} is no route: it has no entry {error}", _CURE) from error
    except (ValueError, TypeError, AttributeError, InvalidInput) as error:
        raise ReleaseError(f"{where} is no route: {error}", _CURE) from error


def read_route(home: Path) -> Route | None:
    """Reads the route; None where none was written yet. ReleaseError if the file is not a route."""
    path = home / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ReleaseError(f"cannot read {path}: {error}", _CURE) from error
    return route_from_json(text, str(path))


def write_route(home: Path, route: Route) -> None:
    """Writes the route, so that a reader finds the old one or this one. Call it under locked()."""
    write_durably(home / FILE, route.to_json())
