"""Holds how the tiers behave, in one small file: `peregrine serve --redis` writes it, the steps read it.

It may hold a password: mode 0600.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from ensemble.errors import InvalidInput

# Names the file; a URL itself in the environment or in argv could be read by anyone on the machine
VARIABLE = "PEREGRINE_TIERS"
_SCHEMES = ("redis://", "rediss://", "unix://", "redis+cluster://", "rediss+cluster://")


@dataclass(frozen=True)
class TierSettings:
    """Says where Redis is, and for how long to believe what it said. Times are of the monotonic clock."""

    url: str = field(repr=False)  # redis://, rediss:// (TLS), unix://; redis+cluster:// for a cluster
    # Of every call to Redis, connecting included; after it the snapshot answers, and what comes late is kept
    deadline_ms: float = 5.0
    # Past it a row in memory is asked for again, and used only if Redis does not answer
    soft_ttl_s: float = 30.0
    hard_ttl_s: float = 300.0  # past it a row in memory is never used
    negative_ttl_s: float = 10.0  # how long "Redis has no such row" is believed
    # Each row's times are shortened by up to this share, so that rows loaded together do not expire together
    jitter: float = 0.2
    memory_bytes: int = 64 << 20  # L1 of each table, in each process
    breaker_failures: int = 3  # failed calls in a row that open the breaker
    breaker_open_s: float = 0.25  # until one call may try again

    def __post_init__(self) -> None:
        if not self.url.startswith(_SCHEMES):
            raise InvalidInput(
                f"--redis: {hidden(self.url)!r} is not a Redis URL",
                "write redis://[USER:PASSWORD@]HOST:PORT[/DB]",
            )
        for name in (
            "deadline_ms",
            "soft_ttl_s",
            "hard_ttl_s",
            "negative_ttl_s",
            "memory_bytes",
            "breaker_failures",
            "breaker_open_s",
        ):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"tiers: {name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.jitter < 1 or self.soft_ttl_s > self.hard_ttl_s:
            raise InvalidInput(
                f"tiers: jitter must be 0..1 and soft_ttl_s at most hard_ttl_s, got {self.jitter}, "
                f"{self.soft_ttl_s}, {self.hard_ttl_s}"
            )


def hidden(url: str) -> str:
    """Gives a URL without its user and password, fit to be shown."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def url_from_option(text: str) -> str:
    """Gives the URL that --redis names: itself, or the first line of @FILE.

    A password in a file stays out of the command line.
    """
    if not text.startswith("@"):
        return text
    try:
        lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"--redis: cannot read {text[1:]}: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        ) from None
    return lines[0].strip() if lines else ""


def write_settings(path: Path, settings: TierSettings) -> None:
    """Writes the file, readable by its owner only."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(settings), file)


def settings_from_environment() -> TierSettings | None:
    """Reads the file that PEREGRINE_TIERS names; None without one: the snapshot alone."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    try:
        return TierSettings(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(
            f"{VARIABLE}={path}: not a file of tier settings ({type(error).__name__})",
            "start the server again",
        ) from None
