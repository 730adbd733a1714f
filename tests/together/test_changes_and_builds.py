"""What was changed while it was served is in the next build, and what comes later goes over it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import light_models
import numpy as np
import pytest
from shops import ROOT, one_thread, private_copy

from clients.operations import releases
from ensemble.live.writer import ItemWriter
from ensemble.local import LocalPipeline
from ensemble.schema import number_names
from ensemble.steps.served import open_served

PLAIN = {"brand": "brand-2", "price": 12.5}


def change(operation: str, item_id: str, **values: object) -> dict:
    return {"op": operation, "item": {"item_id": item_id, **values}}


@pytest.mark.timeout(300)
def test_a_build_starts_from_what_was_changed(tiny_repository: Path, tiny_shop: Path, tmp_path: Path):
    repository = private_copy(tiny_repository, tmp_path / "repository")
    first = open_served(repository, "r1")
    gone, changed = (first.item_ids.sorted_ids[row].decode() for row in (3, 4))
    writer = ItemWriter(first)
    writer.apply(
        [change("delete", gone), change("add", "fresh", **PLAIN), change("update", changed, price=77)]
    )
    light_models.write_light_models(tmp_path)
    command = [sys.executable, "-m", "peregrine", "build", str(tiny_shop), "--preset", "tiny", "--json"]
    command += ["--no-refit", "--repository", str(repository), "--release", "r2", *light_models.OPTIONS]
    environment = one_thread(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "items from the log: 1 added, 1 changed, 1 deleted; up to change 3" in done.stderr
    manifest = json.loads((repository / "r2" / "manifest.json").read_text())
    assert manifest["catalogue"] == {"log": writer.catalogue.id, "sequence": 3}

    second = open_served(repository, "r2")
    rows = second.item_ids.rows_from_ids(np.array([gone, "fresh", changed], dtype="S"))
    assert rows[0] == 0
    assert (rows[1:] > 0).all(), "an item like any other"
    price = number_names(second.schema).index("price")
    assert second.item_numbers[rows[1:], price].tolist() == [12.5, 77]
    assert second.live.view.sequence == 3, "also before a writer has opened it"

    writer.apply([change("update", "fresh", price=5), change("delete", changed)])
    writer.check_against(second)
    view = second.live.refresh()
    assert (view.sequence, view.num_rows) == (5, len(second.items))
    assert view.rows_from_ids(np.array([b"fresh"])).tolist() == [rows[1]], "changed in its own row"
    assert writer.overlay.here(["fresh", changed, gone]).tolist() == [True, False, False]
    writer.apply([change("add", gone, **PLAIN)])
    answer = LocalPipeline(open_served(repository, "r2")).recommend(["u1"], {"top_k": 5})
    assert answer["sequence"].tolist() == [[6]]
    writer.close()
    releases.activate(repository, "r2")
    releases.remove(repository, "r1")
    writer = ItemWriter(open_served(repository, "r2"))
    assert writer.overlay.here(["fresh", changed, gone]).tolist() == [True, False, True]
