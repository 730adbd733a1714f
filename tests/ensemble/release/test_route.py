"""The route says who is answered by which release: the same user by the same one, wherever it is asked."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_repository import publish_toy

from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release import route as routes
from ensemble.release.release import active_release, served_releases
from ensemble.release.repository import align_alias, point_alias, put_route, remove, sweep
from ensemble.release.route import Route, Share, next_route, read_route, user_hashes, write_route

USERS = [f"user-{number}".encode() for number in range(20_000)]


def test_what_is_written_is_read_and_later_entries_are_passed_over(tmp_path):
    assert read_route(tmp_path) is None
    route = next_route(None, [Share("r1", 0.9), Share("r2", 0.1)])
    write_route(tmp_path, route)
    assert read_route(tmp_path) == route
    assert (route.main, route.canary, route.sequence) == ("r1", Share("r2", 0.1), 1)
    assert route.since
    assert "@" in route.by
    path = tmp_path / routes.FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "a later one": 1}))
    assert read_route(tmp_path) == route
    assert [path.name for path in tmp_path.iterdir()] == [routes.FILE]


WRONG = {
    "[": "Expecting value",
    "[]": "list indices",
    '{"format": 2}': "format 2 is not 1",
    '{"format": 1, "releases": [], "salt": "", "sequence": 1}': "1 to 2 releases, each once, got none",
    '{"format": 1, "releases": [{"release": "r1"}]}': "it has no entry 'share'",
    '{"format": 1, "releases": [{"release": "../r1", "share": 1}], "salt": "", "sequence": 1}': "a name such",
    '{"format": 1, "releases": [{"release": "r1", "share": 0.5}], "salt": "", "sequence": 1}': "1 together",
    '{"format": 1, "releases": [{"release": "r1", "share": 1}], "salt": "", "sequence": 0}': "from 1, got 0",
    "\xff": "codec can't decode",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_named_with_its_cure(tmp_path, text):
    (tmp_path / routes.FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(ReleaseError, match=WRONG[text]) as caught:
        read_route(tmp_path)
    assert str(tmp_path / routes.FILE) in str(caught.value)
    assert caught.value.cure.startswith("restore it, or remove it")


@pytest.mark.parametrize(
    "shares",
    [
        [Share("r1", 1.0), Share("r1", 0.0)],
        [Share("r1", 1.0), Share("r2", 0.0)],
        [Share("r1", float("nan"))],
        [Share("r1", 0.5), Share("r2", 0.3), Share("r3", 0.2)],
    ],
)
def test_a_route_that_cannot_be_is_refused(shares):
    with pytest.raises(InvalidInput):
        next_route(None, shares)


@given(share=st.floats(0.01, 0.99), salt=st.text("abcdef", min_size=1, max_size=100))
def test_shares_are_met_and_users_keep_their_release_when_a_canary_grows(share, salt):
    small, large = (
        Route((Share("r1", 1 - part), Share("r2", part)), salt, 1) for part in (share, (1 + share) / 2)
    )
    few, many = small.places(USERS[:4000]), large.places(USERS[:4000])
    assert abs(few.mean() - share) < 5 * np.sqrt(share * (1 - share) / 4000)
    assert (many >= few).all(), "whoever was the canary's stays it"
    assert (small.places(USERS[:4000][::-1])[::-1] == few).all(), "whoever stands beside"


def test_hashes_are_what_blake2b_says_and_even():
    assert user_hashes([b"u1", b""], "salt").tolist() == [HASH_OF_U1, HASH_OF_NOBODY]
    counts, _ = np.histogram(user_hashes(USERS, "s"), 100, (0, 1))
    assert ((counts - 200) ** 2 / 200).sum() < 150, "chi squared, 99 degrees of freedom: 1 in 1,000"
    other = np.corrcoef(user_hashes(USERS, "s"), user_hashes(USERS, "t"))[0, 1]
    assert abs(other) < 0.03, "another salt draws others"


# Fixed for ever: users would move between releases
HASH_OF_U1, HASH_OF_NOBODY = 0.18038130442993394, 0.49708932740757716


def test_whoever_has_no_id_is_the_main_releases():
    route = Route((Share("r1", 0.01), Share("r2", 0.99)), "s", 1)
    assert route.places([b"", b"u1", b""]).tolist() == [0, 1, 0]
    assert Route((Share("r1", 1.0),), "s", 1).places([b"u1"]).tolist() == [0]
    assert route.places([]).shape == (0,)


def test_a_canary_draws_other_users_than_the_last_one_and_keeps_them_while_it_lasts():
    first = next_route(None, [Share("r1", 1.0)])
    second = next_route(first, [Share("r1", 0.9), Share("r2", 0.1)])
    third = next_route(second, [Share("r1", 0.5), Share("r2", 0.5)])
    last = next_route(third, [Share("r2", 1.0)])
    assert [one.sequence for one in (first, second, third, last)] == [1, 2, 3, 4]
    assert first.salt != second.salt == third.salt == last.salt
    assert next_route(last, [Share("r2", 0.9), Share("r3", 0.1)]).salt != last.salt


def test_the_routes_main_release_is_the_active_one_and_the_alias_follows(tmp_path):
    repository = tmp_path / "models"
    publish_toy(repository, "r1", tmp_path, activate=True)
    for name in ("r2", "r3"):
        publish_toy(repository, name, tmp_path)
    assert (active_release(repository), served_releases(repository)) == ("r1", ("r1",)), "by the alias"
    put_route(repository, next_route(None, [Share("r2", 0.8), Share("r3", 0.2)]))
    alias = repository / "recommend" / "config.pbtxt"
    assert alias.read_text() == (repository / "r2" / "alias.pbtxt").read_text()
    assert (active_release(repository), served_releases(repository)) == ("r2", ("r2", "r3"))
    point_alias(repository, (repository / "r1" / "alias.pbtxt").read_text())  # as one that was left behind
    assert active_release(repository) == "r2"
    align_alias(repository)
    assert alias.read_text() == (repository / "r2" / "alias.pbtxt").read_text()
    with pytest.raises(ReleaseError, match=r"release r3 is tried by 0\.2 of the users"):
        remove(repository, "r3")
    (repository / "r3" / "manifest.json").unlink()
    assert sweep(repository, print, min_age_s=0) == [], "what is served is spared"


def test_a_home_beside_the_repository_has_its_own_route(tmp_path):
    repository, home = tmp_path / "models", tmp_path / "home"
    home.mkdir()
    publish_toy(repository, "r1", tmp_path, activate=True)
    publish_toy(repository, "r2", tmp_path)
    put_route(repository, next_route(None, [Share("r2", 1.0)]), home)
    assert (active_release(repository, home), read_route(repository)) == ("r2", None)
    assert not (repository / routes.FILE).exists()
