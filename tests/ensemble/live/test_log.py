"""Logs and generations that are torn or damaged: cut off and said, or refused with the way back; never
skipped."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from random_release import RandomRelease, make_release, open_again, schema_of

from ensemble.errors import ReleaseError
from ensemble.live.log import HEADER_BYTES, record_dtype
from ensemble.live.merge import merge
from ensemble.live.writer import ItemWriter


def written(tmp_path: Path, rng: np.random.Generator, count: int = 6) -> tuple[RandomRelease, Path]:
    release = make_release(tmp_path, rng)
    writer = ItemWriter(release)
    for i in range(count):
        writer.apply([{"op": "delete", "item": {"item_id": f"i{i:05}"}}])
    writer.close()
    return release, release.live_folder / "log-0"


@pytest.mark.parametrize("cut", [1, 100, 190])
def test_a_torn_tail_is_cut_off_and_said(tmp_path, rng, cut):
    release, log = written(tmp_path, rng)
    os.truncate(log, log.stat().st_size - cut)
    assert open_again(release).live.view.sequence == 5, "a reader stops before it"
    notes: list[str] = []
    writer = ItemWriter(open_again(release), notes.append)
    left = record_dtype(release.schema).itemsize - cut
    assert notes == [
        f"{log}: the last {left} bytes were torn by a crash and are cut off; whole up to sequence 5"
    ]
    assert writer.apply([{"op": "delete", "item": {"item_id": "i00005"}}]) == 6
    assert open_again(release).live.view.num_deleted == 6


def test_a_damaged_middle_is_refused_with_the_way_back(tmp_path, rng):
    release, log = written(tmp_path, rng)
    size = record_dtype(release.schema).itemsize
    offset = HEADER_BYTES + 2 * size
    content = bytearray(log.read_bytes())
    content[offset + 30] ^= 1
    log.write_bytes(content)
    for opened in (lambda: open_again(release).live, lambda: ItemWriter(open_again(release))):
        with pytest.raises(ReleaseError) as caught:
            opened()
        assert str(caught.value).startswith(
            f"{log} is damaged at offset {offset}, with whole records behind it; cut it there (`truncate -s "
            f"{offset} {log}`"
        )
        assert f"or move {log.parent} away" in str(caught.value)
    os.truncate(log, offset)  # the way back, as told
    assert open_again(release).live.view.sequence == 2


def test_a_log_that_is_damaged_while_it_is_served_keeps_the_last_good_view(tmp_path, rng):
    release, log = written(tmp_path, rng)
    live = open_again(release).live
    writer = ItemWriter(open_again(release))
    start = log.stat().st_size
    writer.apply([{"op": "delete", "item": {"item_id": f"i{i:05}"}} for i in (50, 51, 52)])
    with log.open("r+b") as file:
        file.seek(start + 20)
        file.write(b"\xff")
    assert live.refresh().sequence == 6
    assert f"{log} is damaged at offset {start}" in live.fault


@pytest.mark.parametrize("content", [b"", b"nonsense" * 20])
def test_a_log_without_its_header_is_refused(tmp_path, rng, content):
    release, log = written(tmp_path, rng)
    log.write_bytes(content)
    with pytest.raises(
        ReleaseError,
        match=r"log-0 is no log of live items, or its header is damaged at offset 0; put a copy of it back, "
        r"or move .* away",
    ):
        open_again(release).live  # noqa: B018


def test_a_log_of_another_schema_is_refused(tmp_path, rng):
    written(tmp_path / "a", rng)
    other = make_release(tmp_path / "b", rng, schema=schema_of(embedding=4))
    (tmp_path / "a" / ".live").rename(tmp_path / "b" / ".live")
    with pytest.raises(ReleaseError, match="belongs to a release with another contract or schema"):
        other.live  # noqa: B018


@pytest.mark.parametrize("name", ["rows.npy", "index.faiss", "meta.json"])
def test_a_changed_generation_is_refused(tmp_path, rng, name):
    release, _ = written(tmp_path, rng)
    writer = ItemWriter(release)
    writer.turn_to(merge(open_again(release), 6), 6)
    writer.close()
    path = release.live_folder / "g1" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        ReleaseError,
        match=r"g1.*put a copy of it back, or move .*r1-\w+ away: the release then serves without live "
        r"items$",
    ):
        open_again(release).live  # noqa: B018


def test_live_items_are_not_those_of_another_release_of_the_same_name(tmp_path, rng):
    """Removed and built again under its old name, with other content: what was changed is not its."""
    release, _ = written(tmp_path, rng)
    release.manifest = {"files": {"r1/items.npy": {"sha256": "a"}}}
    first = RandomRelease(tmp_path, "r1", release.manifest)
    ItemWriter(first).apply([{"op": "delete", "item": {"item_id": "i00001"}}])
    again = RandomRelease(tmp_path, "r1", {**release.manifest, "created": "later"})
    assert again.live.view.num_deleted == 1, "the same content is the same release"
    other = RandomRelease(tmp_path, "r1", {"files": {"r1/items.npy": {"sha256": "b"}}})
    assert (other.live.view.num_deleted, other.live.view.sequence) == (0, 0)
