"""The catalogue's log: durable, refused where it is damaged, and never skipped."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ensemble.errors import ReleaseError
from ensemble.live.catalogue import DELETE, UPSERT, CatalogueReader, Entry, last_entries, open_catalogue
from ensemble.live.catalogue_log import CatalogueLog


def written(repository: Path, count: int = 6) -> Path:
    log = CatalogueLog(repository)
    for i in range(count):
        log.append([Entry(0, 0, UPSERT, f"i{i}", {"brand": f"b\u2028{i}", "price": 1.5, "sizes": [1, "x"]})])
    log.close()
    return log.path


def test_what_was_said_is_read_as_it_was_said(tmp_path):
    written(tmp_path)
    log = CatalogueLog(tmp_path)
    log.append([Entry(0, 0, DELETE, "i2"), Entry(0, 0, UPSERT, "new", embeddings={"r": [0.5, 1]})])
    assert open_catalogue(tmp_path).id == log.id
    last = last_entries(open_catalogue(tmp_path))
    assert list(last) == ["i0", "i1", "i3", "i4", "i5", "i2", "new"], "in the order of the last changes"
    assert last["i2"] == Entry(7, 3, DELETE, "i2"), "it was born with its first change"
    assert last["i4"] == Entry(5, 5, UPSERT, "i4", {"brand": "b\u20284", "price": 1.5, "sizes": [1, "x"]})
    assert [entry.item_id for entry in log.since(5)] == ["i5", "i2", "new"]
    assert log.entry("new").embeddings == {"r": [0.5, 1]}
    assert log.entry("other") is None


@pytest.mark.parametrize("cut", [1, 20, 95])
def test_a_torn_tail_is_cut_off_and_said(tmp_path, cut):
    path = written(tmp_path)
    whole = path.read_bytes()
    os.truncate(path, len(whole) - cut)
    assert list(last_entries(CatalogueReader(path)))[-1] == "i4", "a reader stops before it"
    notes: list[str] = []
    log = CatalogueLog(tmp_path, notes.append)
    left = len(whole.splitlines(keepends=True)[-1]) - cut
    assert notes == [
        f"{path}: the last {left} bytes were torn by a crash and are cut off; whole up to sequence 5"
    ]
    assert log.append([Entry(0, 0, DELETE, "i0")])[0].sequence == 6
    assert last_entries(CatalogueReader(path))["i0"] == Entry(6, 1, DELETE, "i0")


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("place", [1, 3, 5])
def test_a_damaged_line_is_refused_with_the_way_back(tmp_path, place):
    path = written(tmp_path)
    lines = lines_of(path)
    offset = sum(map(len, lines[:place]))
    for damaged in (
        lines[place].replace(b"upsert", b"delete"),
        b"zzzzzzzz" + lines[place][8:],
        lines[place].replace(b"i", b"\n", 1),
    ):
        path.write_bytes(b"".join([*lines[:place], damaged, *lines[place + 1 :]]))
        for opened in (lambda: last_entries(CatalogueReader(path)), lambda: CatalogueLog(tmp_path)):
            with pytest.raises(ReleaseError) as caught:
                opened()
            assert str(caught.value).startswith(
                f"{path} is damaged at offset {offset}, with whole lines behind it; cut it there (`truncate "
                f"-s {offset} {path}`: changes from there on are lost)"
            )
    os.truncate(path, offset)  # the way back, as told
    assert CatalogueLog(tmp_path).sequence == place - 1


def test_a_line_that_is_missing_is_noticed(tmp_path):
    path = written(tmp_path)
    lines = lines_of(path)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))
    with pytest.raises(ReleaseError, match="is damaged at offset"):
        CatalogueLog(tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense" * 20, b"nonsense\n"])
def test_a_log_without_its_first_line_is_refused(tmp_path, content):
    path = written(tmp_path)
    path.write_bytes(content)
    with pytest.raises(
        ReleaseError, match=r"log is no log of a catalogue, or its first line is damaged; put a"
    ):
        CatalogueLog(tmp_path)


def test_a_second_writer_is_refused(tmp_path):
    log = CatalogueLog(tmp_path)
    with pytest.raises(ReleaseError, match=r"^another process writes the items of .*; use it, or stop it$"):
        CatalogueLog(tmp_path)
    log.close()
    CatalogueLog(tmp_path).close()


def test_a_full_disk_leaves_nothing_of_a_group(tmp_path, monkeypatch):
    written(tmp_path)
    log, write = CatalogueLog(tmp_path), os.write
    before = log.path.read_bytes()

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 10:
            return write(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(ReleaseError, match=r"No space left on device; nothing was changed$"):
            log.append([Entry(0, 0, DELETE, "i0x")])
    assert log.path.read_bytes() == before
    assert log.append([Entry(0, 0, DELETE, "i0")])[0].sequence == 7
    assert CatalogueReader(log.path).id == log.id
