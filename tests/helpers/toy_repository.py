"""Releases of a few kilobytes for tests of everything around a release: real contract, real configurations,
steps that answer three items. Their code is their own, which an activation refuses: see allow_toys()."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from builders.publish.stage import publish
from builders.publish.triton_config import write_members
from clients.operations import releases
from ensemble import contract
from ensemble.release import foreign
from ensemble.release.canary import CANARY, CANARY_USER, Canary
from ensemble.release.repository import ALIAS_FILE, point_alias
from ensemble.schema import Schema, Sizes, Table, Task

SCHEMA = Schema(
    "toy",
    Table(),
    Table(),
    (Task("click", "binary"),),
    Sizes(seen=4, history=2, embedding=4, candidates=8, item_features=2, user_features=2, max_batch=8),
)
ITEMS = ("item1", "item2", "item3")
# 0.25 s a request
SLOW = (
    "import time; execute = self.execute; "
    "self.execute = lambda requests: (time.sleep(0.05), execute(requests))[1]"
)
MODEL_PY = """\
import triton_python_backend_utils as pb_utils  # first: it puts our packages, our numpy among them, first
import json
import numpy as np


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.outputs = {o["name"]: o for o in config["output"]}
        self.release = config["parameters"]["release"]["string_value"].encode()
        self.items, self.scores = [b"item1", b"item2", b"item3"], [3, 2, 1]
        BROKEN

    def execute(self, requests):
        return [self.answer(len(r.inputs()[0].as_numpy())) for r in requests]

    def answer(self, batch):
        tensors = []
        for name, spec in self.outputs.items():
            dims = [batch, *(3 if d == -1 else d for d in spec["dims"])]
            kind = pb_utils.triton_string_to_numpy(spec["data_type"])
            text = {"release": self.release, "tasks": b'["click"]'}.get(name, b"")
            values = np.full(dims, text, object) if kind is np.object_ else np.zeros(dims, kind)
            if name == "item_ids":
                values[:] = self.items
            if name == "scores":
                values[:] = self.scores[: dims[1]]
            tensors.append(pb_utils.Tensor(name, values))
        return pb_utils.InferenceResponse(output_tensors=tensors)
"""


def allow_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets toys be served and activated in this process though their code is theirs, and no twin can run
    it."""
    monkeypatch.setattr(foreign, "_is_ours", lambda text: True)
    monkeypatch.setattr(releases, "ask_twin", lambda release: None)


def publish_toy(
    repository: Path,
    name: str,
    scratch: Path,
    *,
    broken: str = "",
    padding_bytes: int = 1000,
    item_ids: tuple[bytes, ...] = (),
    activate: bool = False,
) -> bool:
    """Publishes a toy; `broken` is a statement for its initialize(); with `item_ids`, it has a file of them.
    False if it was there."""
    folder = scratch / f"toy-{name}"
    members = write_members(contract.pipelines(SCHEMA), contract.beside(SCHEMA), name, folder)
    for member in members.values():  # the ensemble's own too, which runs where it is served fused
        (member / "1" / "model.py").write_text(MODEL_PY.replace("BROKEN", broken or "pass"))
    (folder / name / "schema.json").write_text(SCHEMA.to_json())
    (folder / name / "padding.bin").write_bytes(b"\1" * padding_bytes)
    np.save(folder / name / "user_ids.npy", np.array([b"u1"]))
    if item_ids:
        np.save(folder / name / "item_ids.npy", np.array(item_ids))
    canary = Canary(3, ("u1", CANARY_USER), (ITEMS, ITEMS), ((3.0, 2.0, 1.0),) * 2)
    (folder / name / CANARY).write_text(canary.to_json())
    is_new = publish(
        repository, name, members, folder / name, {"shop": "toy", "contract": contract.fingerprint(SCHEMA)}
    )
    if activate:
        point_alias(repository, (repository / name / ALIAS_FILE).read_text())
    return is_new


def manifest_of(repository: Path, name: str) -> dict:
    return json.loads((repository / name / "manifest.json").read_text())
