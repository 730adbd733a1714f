"""What subcommands share: the release that is named, or the active one, or one error that says the cure."""

from __future__ import annotations

import pytest

from ensemble.cli.options import active_or_named
from ensemble.errors import ReleaseError


def test_a_named_release_wins_over_the_active_one(tiny_repository):
    assert active_or_named(tiny_repository, "r7") == "r7"
    assert active_or_named(tiny_repository) == "r1"


def test_without_an_active_release_the_error_says_what_could_be_activated(tmp_path):
    with pytest.raises(
        ReleaseError, match=r"^no release is active in .*; `peregrine build SHOP --activate`$"
    ):
        active_or_named(tmp_path)
    (tmp_path / "r2").mkdir()
    (tmp_path / "r2" / "manifest.json").write_text("{}")
    with pytest.raises(ReleaseError, match=r"; `peregrine release activate NAME` \(there are: r2\)$"):
        active_or_named(tmp_path)
