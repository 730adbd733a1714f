"""Brings a whole release from a staging folder into a repository: its members first, its manifest last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ensemble.errors import InvalidInput
from ensemble.release.files import sync_folder
from ensemble.release.names import is_there, remember_names
from ensemble.release.repository import locked


def rename_in(repository: Path, stage: Path, folders: Sequence[str], release_id: str) -> bool:
    """Moves members in first and the own folder (last of `folders`) last: its manifest is the publication.

    False if the release is there already; InvalidInput if the name was given to another one.
    """
    with locked(repository):
        if is_there(repository, folders[-1], release_id):
            return False
        _refuse_existing(repository, folders)
        moved: list[str] = []
        try:
            for folder in folders:
                if folder == folders[-1]:
                    sync_folder(repository)  # no power cut may keep the manifest and lose a member
                (stage / folder).rename(repository / folder)
                moved.append(folder)
            sync_folder(repository)
        except OSError:
            for folder in reversed(moved):
                (repository / folder).rename(stage / folder)
            raise
        remember_names(repository)
    return True


def _refuse_existing(repository: Path, folders: Sequence[str]) -> None:
    """Raises InvalidInput if a folder of the release is there, though its manifest is not."""
    for folder in folders:
        if (repository / folder).exists():
            raise InvalidInput(
                f"{repository / folder} is there, of a release without a manifest: a copy under way, or "
                "what a killed command left; wait for it, choose another name, or `peregrine release "
                f"remove {folders[-1]}`"
            )
