"""Before servers answer with a release, its rows are looked for in their Redis."""

from __future__ import annotations

import pytest
from random_release import RandomRelease
from redis_server import RedisServer

from ensemble.tiers.load import load_release
from ensemble.tiers.loaded import rows_missing

pytestmark = pytest.mark.redis


def test_rows_that_are_not_loaded_are_told_with_the_command_that_loads_them(
    release: RandomRelease, server: RedisServer
) -> None:
    said = rows_missing(release, server.url)
    assert said.startswith(f"Redis at {server.url} has no rows for release {release.name}: ")
    load = f"peregrine features load --redis {server.url} -r {release.repository} --release {release.name}"
    assert said.endswith(load)
    load_release(release, server.url)
    assert rows_missing(release, server.url) == ""


def test_rows_of_another_release_of_that_name_are_none(release: RandomRelease, server: RedisServer) -> None:
    load_release(release, server.url)
    release.manifest["files"] = {f"{release.name}/items.npy": {"sha256": "of a later build"}}
    assert f"has rows of another release of that name for release {release.name}" in rows_missing(
        release, server.url
    )


def test_a_redis_that_is_away_cannot_tell_and_no_password_is_shown(
    release: RandomRelease, own_server: RedisServer
) -> None:
    own_server.kill()
    said = rows_missing(release, f"redis://me:planted@127.0.0.1:{own_server.port}")
    assert said.startswith(f"Redis at redis://127.0.0.1:{own_server.port} does not answer: ")
    assert said.endswith(f"whether it has the rows of release {release.name} is not known")
    assert "planted" not in said
