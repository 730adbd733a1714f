"""Opens a release the way a serving process needs it: what its steps share is there once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from ensemble.live.items import LiveItems
from ensemble.release.release import Release, open_release
from ensemble.telemetry import Metric
from ensemble.tiers.reader import RowReaders


class ServedRelease(Release):
    """A release with what a process adds to it: the items as they are now, and rows through the tiers."""

    @cached_property
    def live(self) -> LiveItems:
        """Gives the items as they are now: the release's, and what was added, changed and deleted since."""
        return LiveItems(self)

    @cached_property
    def readers(self) -> RowReaders:
        """Reads rows of users and items; all steps of a process share one memory and one way to Redis."""
        return RowReaders(self)

    def metrics(self) -> list[Metric]:
        """Lists the tiers' numbers, once for all steps of a process; nothing while no step reads rows."""
        return self.readers.metrics() if "readers" in self.__dict__ else []

    def close(self) -> None:
        """Ends the thread that follows the live items, where a step has opened them."""
        if "live" in self.__dict__:
            self.live.close()


def open_served(repository: Path, name: str) -> ServedRelease:
    """Opens release `name` for its steps; ReleaseError as open_release has it."""
    release = open_release(repository, name)
    return ServedRelease(repository, name, release.manifest)
