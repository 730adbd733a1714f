"""One log for all releases: each makes its own overlay of it, and makes it again where it is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from random_release import RandomRelease, make_release, open_again, schema_of, write_item_encoder

from ensemble.errors import ReleaseError
from ensemble.live.catalogue import log_folder
from ensemble.live.items import LiveView
from ensemble.live.log import HEADER_BYTES, record_dtype
from ensemble.live.merge import merge
from ensemble.live.overlay import Overlay
from ensemble.live.writer import ItemWriter


def other_release(repository: Path, rng: np.random.Generator, name: str = "r2", **options) -> RandomRelease:
    """Another release in the same repository, with an encoder of its own."""
    made = make_release(repository / "elsewhere" / name, rng, **options)
    made.path.rename(repository / name)
    release = RandomRelease(repository, name, {"files": {name: {"sha256": "another"}}})
    write_item_encoder(release, seed=7)
    return release


def change(operation: str, item_id: str, **values) -> dict:
    return {"op": operation, "item": {"item_id": item_id, **values}}


FIRST = [
    change("delete", "i00001"),
    change("add", "new1", brand="brand1", price=3, item_embedding=[9.0] * 8),
    change("update", "i00002", price_eur=80.0),
    change("add", "new2", brand="brand2"),
    change("upsert", "i00003", tags="tag1|tag2"),
]
LATER = [
    change("delete", "new2"),
    change("update", "new1", brand="brand3"),
    change("upsert", "new3", price=None),
    change("update", "i00002", brand="brand5"),
    change("add", "i00001", price=7),
]


def shown(view: LiveView) -> dict[bytes, tuple]:
    """What a view shows of each item that is not deleted: its row and all of its content."""
    rows = np.arange(1, view.num_rows)
    rows = rows[~view.is_deleted(rows)]
    content = [view.gather(rows, field).tolist() for field in ("embedding", "features", "codes", "values")]
    return dict(
        zip(view.ids_from_rows(rows).tolist(), zip(rows.tolist(), *content, strict=True), strict=True)
    )


def test_changes_hold_for_every_release_as_it_encodes_them(tmp_path, rng):
    first = make_release(tmp_path, rng)
    write_item_encoder(first)
    second = other_release(tmp_path, rng, schema=schema_of(embedding=4))
    writer = ItemWriter(first)
    writer.apply(FIRST)
    view = writer.follow(second).live.view
    assert view.sequence == 5
    assert not {b"i00001"} & set(shown(view))
    assert shown(view)[b"new1"][0] == shown(writer.live.view)[b"new1"][0] == 121
    assert len(shown(view)[b"new1"][1]) == 4, "an embedding that was brought for another release is not used"
    assert shown(writer.live.view)[b"new1"][1] == [9.0] * 8
    writer.apply(LATER)
    for release in (first, second):
        after = shown(open_again(release).live.view)
        assert {b"new1", b"new3", b"i00001"} <= set(after)
        assert b"new2" not in after
        assert after[b"i00002"][3][0] == 1 + 1 + 5
        np.testing.assert_allclose(after[b"i00002"][4], [1.0])
        assert after[b"i00001"][3] == [0, 0, 0], "what it was before it was deleted is over"


def test_a_release_that_is_loaded_again_has_what_it_missed(tmp_path, rng):
    first = make_release(tmp_path, rng)
    write_item_encoder(first)
    second = other_release(tmp_path, rng)
    writer = ItemWriter(first)
    writer.apply(FIRST)
    writer.check_against(second)
    writer.leave(first.id)
    writer.apply(LATER)
    assert open_again(first).live.view.sequence == 5
    writer.check_against(first)
    assert {key: row[0] for key, row in shown(writer.live.view).items()}.keys() == shown(
        writer.overlays[second.id].live.view
    ).keys()
    assert writer.live.view.sequence == 10


@pytest.mark.parametrize("harm", ["gone", "cut", "damaged", "no current", "merged", "merge damaged"])
def test_an_overlay_is_the_same_when_it_is_made_again(tmp_path, rng, harm):
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    writer = ItemWriter(release)
    writer.apply(FIRST)
    if "merge" in harm:
        writer.overlay.turn_to(merge(open_again(release), 5), 5)
    for one in LATER:
        writer.apply([one])
    before, log = shown(writer.live.view), release.live_folder / f"log-{int('merge' in harm)}"
    writer.close()
    notes: list[str] = []
    if harm == "gone":
        shutil.rmtree(release.live_folder)
    elif harm == "cut":
        os.truncate(log, HEADER_BYTES + 3 * record_dtype(release.schema).itemsize + 50)
    elif harm == "damaged":
        with log.open("r+b") as file:
            file.seek(HEADER_BYTES + 2 * record_dtype(release.schema).itemsize + 30)
            file.write(b"\xff\xff")
    elif harm == "no current":
        (release.live_folder / "current").write_text("seven")
    elif harm == "merge damaged":
        path = release.live_folder / "g1" / "rows.npy"
        path.write_bytes(path.read_bytes()[:-9])
    if harm in ("damaged", "no current", "merge damaged"):
        with pytest.raises(
            ReleaseError, match=r"start the writer, `peregrine serve` or `peregrine items serve`"
        ):
            open_again(release).live  # noqa: B018
    again = ItemWriter(open_again(release), notes.append)
    assert [note.endswith(f"made again from {log_folder(tmp_path) / 'log'}") for note in notes] == [True] * (
        harm in ("damaged", "no current", "merge damaged")
    )
    assert shown(again.live.view) == before
    assert shown(open_again(release).live.view) == before
    again.apply([change("delete", "new1")])
    assert open_again(release).live.view.sequence == 11


def test_what_was_durable_before_a_crash_is_shown_after_it(tmp_path, rng, monkeypatch):
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    writer = ItemWriter(release)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Overlay, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.apply(FIRST)
    writer.close()
    assert open_again(release).live.view.sequence == 0
    again = ItemWriter(open_again(release))
    assert again.live.view.sequence == again.sequence == 5
    assert b"new1" in shown(again.live.view)


def test_a_release_starts_at_its_watermark(tmp_path, rng):
    first = make_release(tmp_path, rng)
    write_item_encoder(first)
    writer = ItemWriter(first)
    writer.apply(FIRST)
    second = other_release(tmp_path, rng)
    second.manifest["catalogue"] = {"log": writer.catalogue.id, "sequence": 5}
    assert writer.follow(second).live.view.num_slots == 0, "the build has read these"
    assert b"i00001" in shown(open_again(second).live.view), "what the build made of it counts"
    writer.apply(LATER)
    view = open_again(second).live.view
    assert (view.sequence, view.num_slots) == (10, 4)
    assert view.rows_from_ids(np.array([b"new3", b"new1"])).tolist() == [123, 121], (
        "in order of first changes"
    )
    third = other_release(tmp_path, rng, "r3")
    third.manifest["catalogue"] = {"log": "another log", "sequence": 7}
    assert b"i00003" in shown(writer.follow(third).live.view)
    assert writer.overlays[third.id].live.view.num_slots == 5, "another log's numbers mean nothing here"
    fourth = other_release(tmp_path, rng, "r4")
    fourth.manifest["catalogue"] = {"log": writer.catalogue.id, "sequence": 11}
    with pytest.raises(
        ReleaseError, match=r"ends at change 10, but release r4 was built from it up to change 11; "
    ):
        writer.follow(fourth)


def test_what_does_not_fit_another_release_is_left_out_there(tmp_path, rng):
    first = make_release(tmp_path, rng)
    write_item_encoder(first)
    second = other_release(tmp_path, rng)
    (second.path / "encoding.json").write_text(
        (second.path / "encoding.json").read_text().replace('"log1p": false, "mean"', '"log1p": true, "mean"')
    )
    writer = ItemWriter(first)
    writer.apply([change("add", "odd", price=-3.0, brand="brand1")])
    overlay = writer.follow(second)
    assert shown(overlay.live.view)[b"odd"][3][0] == 3
    assert overlay.encoding.left_out["price_eur: is negative; its feature is read as log(1 + x)"] == 1
    assert writer.sequence == overlay.sequence == 1


def test_a_log_of_before_there_was_one_for_all_is_refused_and_said(tmp_path, rng):
    release = make_release(tmp_path, rng)
    release.live_folder.mkdir(parents=True)
    (release.live_folder / "current").write_text("0\n")
    (release.live_folder / "log-0").write_bytes(b"peregrine live 1".ljust(64 + 300, b"\0"))
    for opened in (lambda: open_again(release).live, lambda: ItemWriter(release)):
        with pytest.raises(ReleaseError) as caught:
            opened()
        assert str(caught.value) == (
            f"{release.live_folder / 'log-0'} has items that an earlier Peregrine changed, encoded for this "
            f"release alone; move {release.live_folder} away, and send those changes again"
        )


def test_a_damaged_overlay_keeps_the_last_good_view_while_it_is_served(tmp_path, rng):
    release = make_release(tmp_path, rng)
    writer = ItemWriter(release)
    writer.apply([change("delete", "i00001")])
    live, log = open_again(release).live, release.live_folder / "log-0"
    start = log.stat().st_size
    writer.apply([change("delete", f"i{i:05}") for i in (50, 51, 52)])
    with log.open("r+b") as file:
        file.seek(start + 20)
        file.write(b"\xff")
    assert live.refresh().sequence == 1
    assert f"{log} is damaged at offset {start}" in live.fault
    writer.renew(writer.overlay)
    assert live.refresh().sequence == 4
    assert live.fault == ""
