"""A file of lines is followed across rotations, and no line is lost at one."""

from __future__ import annotations

from itertools import islice

from clients.cli.following import FollowedFile


def test_what_is_written_between_the_last_look_and_a_rotation_is_read(tmp_path, monkeypatch):
    file = tmp_path / "events.jsonl"
    file.write_text("1\n")
    followed = FollowedFile(file, tmp_path / "offset")
    asked = FollowedFile._is_rotated

    def just_now(self: FollowedFile) -> bool:
        monkeypatch.setattr(FollowedFile, "_is_rotated", asked)
        with file.open("a") as out:
            out.write("2\nthe last, without an end")
        file.rename(tmp_path / "events.jsonl.1")
        file.write_text("3\n")
        return asked(self)

    monkeypatch.setattr(FollowedFile, "_is_rotated", just_now)
    lines = list(islice(followed.lines(), 7))
    assert [line for line in lines if line is not None] == [b"1", b"2", b"the last, without an end", b"3"]
    followed.close()
