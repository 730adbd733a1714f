"""Merging costs what was changed, however large the catalogue; what is served is the same before and
after."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from item_changes import KINDS, Mirror, hold_against, random_changes, recall_of
from random_release import make_release, open_again, write_item_encoder

from ensemble.errors import ReleaseError
from ensemble.live import overlay as overlay_module
from ensemble.live.merge import _num_joined, merge
from ensemble.live.segment import check_segment
from ensemble.live.writer import ItemWriter


def merged(writer: ItemWriter) -> None:
    sequence = writer.sequence
    writer.overlay.turn_to(merge(open_again(writer.release), sequence), sequence)


@pytest.mark.parametrize("index", KINDS)
def test_what_is_found_is_what_is_there_through_many_merges(tmp_path, rng, index):
    release = make_release(tmp_path, rng, index=index)
    write_item_encoder(release)
    writer, recall, mirror = ItemWriter(release), recall_of(open_again(release), index), Mirror(release)
    most = 0
    for turn, size in enumerate((60, 20, 6, 2, 2, 8, 30, 4)):
        changes = random_changes(rng, release, size)
        writer.apply(changes)
        mirror.apply(changes)
        merged(writer)
        if turn % 3:
            changes = random_changes(rng, release, 4)
            writer.apply(changes)
            mirror.apply(changes)
        hold_against(recall, mirror, rng, exact=index == "Flat")
        most = max(most, len(recall.live.view.state.segments))
    assert most >= 3
    before = recall.live.view
    hold_against(recall_of(open_again(release), index), mirror, rng, exact=index == "Flat")
    rows = np.arange(1, before.num_rows)
    writer.close()
    for path in release.live_folder.iterdir():
        path.rename(tmp_path / path.name)
    again = ItemWriter(open_again(release)).live.view
    assert again.state.segments == []
    alive = ~before.is_deleted(rows)
    np.testing.assert_array_equal(again.is_deleted(rows), ~alive)
    for field in ("embedding", "features", "values"):
        np.testing.assert_array_equal(again.gather(rows[alive], field), before.gather(rows[alive], field))
    names = before.ids_from_rows(rows[alive])
    np.testing.assert_array_equal(again.ids_from_rows(rows[alive]), names)
    np.testing.assert_array_equal(before.rows_from_ids(names), rows[alive])


def test_a_segment_that_a_killed_writers_merge_has_left_is_in_nobodys_way(tmp_path, rng):
    """The merge goes on when its writer is killed, and may end after the next writer has swept."""
    release = make_release(tmp_path, rng)
    writer = ItemWriter(release)
    writer.apply([{"op": "delete", "item": {"item_id": "i00001"}}])
    merge(open_again(release), writer.sequence)  # g1, and nobody turns to it
    writer.apply([{"op": "delete", "item": {"item_id": "i00002"}}])
    merged(writer)
    (segment,) = writer.live.view.state.segments
    assert len(segment.part.gone) == 2


def test_a_change_is_moved_a_few_times_however_many_there_are():
    sizes: list[int] = []
    moved = 0
    for _ in range(1000):
        joined = _num_joined(sizes, 1)
        size = 1 + sum(sizes[len(sizes) - joined :])
        sizes[len(sizes) - joined :] = [size]
        moved += size
        assert len(sizes) <= 10
    assert sum(sizes) == 1000
    assert moved < 15 * 1000


def test_a_merge_reads_and_writes_nothing_of_the_catalogue(tmp_path, rng, monkeypatch):
    """Neither its rows nor its index, which is emptied once."""
    release = make_release(tmp_path, rng, num_items=20_000)
    writer = ItemWriter(release)
    writer.apply([{"op": "delete", "item": {"item_id": f"i{i:05}"}} for i in range(3)])
    merged(writer)
    (release.path / "index.faiss").rename(tmp_path / "index.faiss")
    writer.apply([{"op": "delete", "item": {"item_id": "i00004"}}])
    merged(writer)
    written = sum(path.stat().st_size for path in release.live_folder.glob("g*/*"))
    assert written < release.path.joinpath("items.npy").stat().st_size / 100
    assert writer.live.view.num_deleted == 4


def test_an_overlay_that_is_far_behind_is_sealed_at_once(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(overlay_module, "SEALED_AT_ONCE", 8)
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    writer, mirror = ItemWriter(release), Mirror(release)
    writer.close()
    for _ in range(3):
        other = ItemWriter(open_again(release))
        changes = random_changes(rng, open_again(release), 30)
        other.apply(changes)
        mirror.apply(changes)
        other.close()
        for path in release.live_folder.iterdir():
            path.rename(tmp_path / f"{path.name}-{rng.integers(1 << 30)}")
    ItemWriter(open_again(release)).close()
    recall = recall_of(open_again(release))
    assert recall.live.view.num_slots - recall.live.view.state.tail_start < 8
    assert len(recall.live.view.state.segments) in (1, 2, 3, 4)
    hold_against(recall, mirror, rng, exact=True)


def test_rows_of_segments_are_mapped_and_no_process_copies_them(tmp_path, rng):
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    writer = ItemWriter(release)
    writer.apply(random_changes(rng, release, 60))
    merged(writer)
    reader = open_again(release)
    state, recall = reader.live.view.state, recall_of(open_again(release))
    for array in (state.segments[0].part.items, state.segments[0].part.rows, state.segments[0].part.ids):
        assert isinstance(array.base, np.memmap)
    assert state.segments[0].index is None, "features and reranking open no index"
    assert recall.live.view.state.segments[0].index is not None
    opened = recall.live.view.state.segments[0]
    writer.apply(random_changes(rng, release, 2))
    merged(writer)
    assert recall.live.refresh().state.segments[0] is opened, "what is open is not opened again"


def test_only_writers_hold_files_against_their_digests(tmp_path, rng, monkeypatch):
    release = make_release(tmp_path, rng)
    writer = ItemWriter(release)
    writer.apply([{"op": "delete", "item": {"item_id": "i00004"}}])
    merged(writer)
    writer.close()
    folder = release.live_folder / "g1"
    check_segment(folder)
    content = bytearray((folder / "gone.npy").read_bytes())
    content[-1] ^= 1
    (folder / "gone.npy").write_bytes(content)
    with pytest.raises(ReleaseError, match=r"gone\.npy: sha256 mismatch; start the writer"):
        check_segment(folder)
    notes: list[str] = []
    assert ItemWriter(open_again(release), notes.append).live.view.num_deleted == 1
    assert "gone.npy: sha256 mismatch" in notes[0]


def test_a_segment_of_an_overlay_that_was_made_again_is_not_taken_for_the_old_one(tmp_path, rng):
    release = make_release(tmp_path, rng)
    writer = ItemWriter(release)
    writer.apply([{"op": "delete", "item": {"item_id": "i00001"}}])
    merged(writer)
    reader = open_again(release)
    assert reader.live.view.num_deleted == 1
    writer.close()
    os.rename(release.live_folder, tmp_path / "old")
    writer = ItemWriter(open_again(release))
    writer.apply([{"op": "delete", "item": {"item_id": "i00002"}}])
    merged(writer)
    assert Path(release.live_folder / "g1").exists()
    assert reader.live.refresh().is_deleted(np.array([2, 3, 4])).tolist() == [True, True, False]
