"""What titles and pictures tell: which words are masked, and who is asked about what."""

from __future__ import annotations

import pytest

from builders.bench.titles_and_pictures import cold_events, main, masked
from builders.data.stage import load_dataset


def test_every_word_of_a_types_name_is_masked_in_singular_and_plural():
    titles = ["Nike Men's running Shoe", "Kurta and Kurtas, Set", "Red Bag"]
    assert masked(titles, ["Sports Shoes", "Kurta Sets"]) == ["Nike Men's running", "and", "Red Bag"]


def test_a_cold_item_is_asked_about_with_all_that_was_warm_before_it(tmp_path):
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,time\n"
        + "".join(f"{u},{i},{t}\n" for t, (u, i) in enumerate([(1, 3), (1, 5), (2, 7), (2, 3)]))
    )
    (tmp_path / "items.csv").write_text("item_id\n3\n5\n7\n10\n20\n")
    (tmp_path / "shop.toml").write_text(
        'name = "b"\n[interactions]\nfile = "log.csv"\n[items]\nfile = "items.csv"\nid = "item_id"\n'
    )
    dataset = load_dataset(tmp_path)
    (tmp_path / "Beauty.txt").write_text("1 10 3 20 5 10\n2 7 3 20\n")
    users, ends, wanted = cold_events(tmp_path / "Beauty.txt", dataset)
    pasts = [
        dataset.histories.item_rows[dataset.histories.offsets[u] : end]
        for u, end in zip(users, ends, strict=True)
    ]
    ids = [[dataset.item_ids[row - 1].decode() for row in past] for past in pasts]
    assert ids == [["3"], ["3", "5"], ["7", "3"]], "the first cold one has nothing before it"
    assert [dataset.item_ids[row - 1] for row in wanted] == [b"20", b"10", b"20"]


def test_what_is_unknown_or_missing_is_said_in_a_line(tmp_path, capsys):
    for arguments, said in (
        (["--only", "music"], "known: types, cold"),
        (["--only", "types"], "items.csv is missing"),
    ):
        with pytest.raises(SystemExit):
            main([str(tmp_path), "--out", str(tmp_path / "out"), *arguments])
        assert said in capsys.readouterr().err
