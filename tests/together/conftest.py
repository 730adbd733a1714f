"""A repository with two releases, for features that meet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from any_order_answers import USERS
from shops import private_copy
from variants import publish_variant

from ensemble.release.release import open_release
from ensemble.tiers.past import FIELDS


@pytest.fixture(scope="session")
def two_releases(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with r1, active, and r2 of the same files; not to be changed."""
    folder = tmp_path_factory.mktemp("two")
    repository = private_copy(tiny_repository, folder / "repository")
    publish_variant(repository, "r1", "r2", folder / "scratch")
    return repository


@pytest.fixture(scope="session")
def two_variants(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with r1, active, and r2, in which some users did other things; not to be changed."""
    folder = tmp_path_factory.mktemp("variants")
    repository = private_copy(tiny_repository, folder / "repository")
    release = open_release(repository, "r1")
    rows = release.user_ids.rows_from_ids(np.array(USERS))

    def have_done_less(own: Path, members: dict[str, Path]) -> None:
        users = np.load(own / "users.npy")
        for row in rows[rows > 0].tolist():
            for name, padding in zip(FIELDS, (-1, 0, 0), strict=True):
                users[name][row] = np.roll(users[name][row], 5)
                users[name][row, :5] = padding
        np.save(own / "users.npy", users)

    publish_variant(repository, "r1", "r2", folder / "scratch", have_done_less)
    return repository
