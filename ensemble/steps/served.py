"""Opens a release as a serving process needs it: what its steps share is there once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from ensemble.live.items import LiveItems
from ensemble.release.release import Release, open_release
from ensemble.telemetry import Metric
from ensemble.tiers.reader import RowReaders


class ServedRelease(Release):
    """Adds to a release what all steps of a process share: the items as they are now, and rows through the
    tiers. Each is opened when the first step asks for it."""

    @cached_property
    def live(self) -> LiveItems:
        """Gives the items as they are now: the release's, and what was added, changed and deleted since."""
        return LiveItems(self)

    @cached_property
    def readers(self) -> RowReaders:
        """Gives the readers of users and items, with one memory and one way to Redis for all steps."""
        return RowReaders(self)

    def metrics(self) -> list[Metric]:
        """Lists the tiers' numbers, once for all steps of the process; none while no step reads rows."""
        return self.readers.metrics() if self._is_open("readers") else []

    def close(self) -> None:
        """Ends the threads that follow the live items and Redis, where a step has opened them."""
        if self._is_open("live"):
            self.live.close()
        if self._is_open("readers"):
            self.readers.close()

    def _is_open(self, name: str) -> bool:
        """Says whether a cached property has been asked for; asking for it would open it."""
        return name in self.__dict__


def open_served(repository: Path, name: str, home: Path | None = None) -> ServedRelease:
    """Opens release `name` for its steps; ReleaseError if it is absent, half there or of another contract.

    `home` is where its items' changes lie: the repository if not given.
    """
    return ServedRelease(repository, name, open_release(repository, name).manifest, home)
