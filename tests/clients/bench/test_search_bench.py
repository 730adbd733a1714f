"""What measures searches: texts and pictures in turn, alone and many, of a real server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from clients.bench.loadgen import Load, encoded_requests
from clients.bench.search import main, pictures_of
from ensemble.errors import InvalidInput


def test_searches_hold_texts_and_pictures_in_turn(tmp_path, rng):
    np.save(tmp_path / "users.npy", np.array([b"u1", b"u2"]))
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(name.encode())
    load = Load(
        "", str(tmp_path / "users.npy"), 1.0, texts=["red", "blue", "green"], pictures=pictures_of(tmp_path)
    )
    asked = [service_pb2.ModelInferRequest.FromString(data) for data in encoded_requests(load, rng)[:4]]
    assert {request.model_name for request in asked} == {"search"}
    said = [[bytes(raw)[4:] for raw in request.raw_input_contents[1:]] for request in asked]
    assert said == [[b"red", b"a.png"], [b"blue", b"b.png"], [b"green", b"a.png"], [b"red", b"b.png"]]


def test_a_shop_without_pictures_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"there is no file in .*images$"):
        pictures_of(tmp_path)


@pytest.mark.long
@pytest.mark.triton
def test_a_real_server_is_measured_by_text_and_by_picture(
    pictured_repository: Path, pictured_shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--repository", str(pictured_repository), "--shop", str(pictured_shop)]
    main([*where, "--seconds", "1", "--ways", "fused", "--concurrency", "4"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 6
    assert all(float(row[3]) > 1 and row[-1].startswith("0") for row in rows)
