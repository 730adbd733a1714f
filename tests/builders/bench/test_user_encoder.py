"""The user encoder alone, measured without a build of the rest."""

from __future__ import annotations

import json

import pytest
from shops import write_sequences_shop

from builders.bench.user_encoder import main

FAST = ("encoders.epochs=3", "encoders.evaluate_every=1")


def test_the_user_encoder_alone_stands_beside_the_knn_and_recall(tmp_path, capsys):
    shop = tmp_path / "shop"
    write_sequences_shop(shop, users=300, items=150)
    settings = [word for one in FAST for word in ("--set", one)]
    main([str(shop), "--out", str(tmp_path / "out"), "--preset", "tiny", "--test", *settings])
    printed = capsys.readouterr().out
    told = json.loads(printed[printed.index("{") :])
    curve = told["encoders"]["curve"]
    assert [entry["epoch"] for entry in curve] == [1, 2, 3]
    for part in ("validation", "test"):
        assert set(told[part]) == {"user_encoder", "transition_knn", "recall"}
        assert all(0 < one["ndcg@10"] <= one["hr@10"] <= one["recall@64"] for one in told[part].values())
    # the stage judges epochs on the same targets, ranked in the same way
    best = max(entry["validation"] for entry in curve)
    assert told["validation"]["user_encoder"]["ndcg@10"] == pytest.approx(best, abs=1e-3)


def test_an_unknown_setting_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--out", str(tmp_path / "out"), "--set", "encoders.epoch=3"])
    assert capsys.readouterr().err.startswith("error: --set encoders.epoch: no such setting")
