"""Names the callbacks by which long work says how far it is, and a training how good."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, str], None]  # share done 0..1, what is being done
Watch = Callable[[int, float], None]  # an epoch of a training, and its validation: more is better


def unwatched(epoch: int, validation: float) -> None:
    """Watches no training."""


def part_of(progress: Progress, start: float, end: float, prefix: str = "") -> Progress:
    """Gives the callback of work that takes the shares `start` to `end` of the whole, and prefixes texts."""
    return lambda share, text: progress(start + share * (end - start), prefix + text)
