"""Adding a model before recall: contract.py changes, one file is new, and everything else follows."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from asking import OUTPUTS, TritonAsker
from light_models import OPTIONS, write_light_models
from shops import ROOT, one_thread

pytestmark = pytest.mark.triton

TEXT_ENCODER = '''\
"""A toy: embeds a user's id, as a real one would embed a query's words."""

import numpy as np


class TextEncoder:
    def __init__(self, model, release):
        self.dim = release.schema.sizes.embedding

    def run(self, options, *, user_id):
        """user_id [B, 1] bytes -> text_embeddings [B, 1, D]."""
        rngs = (np.random.default_rng(list(user)) for user in user_id[:, 0].tolist())
        rows = [rng.standard_normal((1, self.dim), dtype=np.float32) for rng in rngs]
        return {"text_embeddings": np.stack(rows)}
'''
EDITS = (  # all of contract.py that changes
    ('QUERY_TENSORS = ("user_embeddings",)', 'QUERY_TENSORS = ("user_embeddings", "text_embeddings")'),
    (
        '    recall = ModelSpec(\n        "recall",',
        '    text_encoder = ModelSpec("text_encoder", "ensemble.text_encoder:TextEncoder", (t["user_id"],), '
        '(t["text_embeddings"],))\n'
        '    recall = ModelSpec(\n        "recall",',
    ),
    ("models=(features, user_encoder, recall,", "models=(features, user_encoder, text_encoder, recall,"),
    (
        '    ("candidate_rows", "int64",',
        '    ("text_embeddings", "float32", ("1", "D"), "what the toy makes of the id"),\n'
        '    ("candidate_rows", "int64",',
    ),
)
ASK_TWIN = """\
import json, sys
from pathlib import Path
import numpy as np
import ensemble
from ensemble.local import LocalPipeline
from ensemble.steps.served import open_served
root, users = sys.argv[1], [u.encode() for u in sys.argv[2].split()]
assert str(Path(ensemble.__file__).parent.parent) == root, ensemble.__file__
answer = LocalPipeline(open_served(Path(sys.argv[1]) / "repository", "r1")).recommend(users)
arrays = {name: array.astype("S") if array.dtype == object else array for name, array in answer.items()}
np.savez(sys.argv[3], **arrays)
"""
BUILD = "import sys; sys.argv[0] = 'peregrine'; from peregrine import main; main()"
SHOP = (
    "from pathlib import Path; import sys; from builders.shop.generate import generate_shop; "
    "generate_shop(Path(sys.argv[1]), users=80, items=90, events=2500, images=False)"
)
SERVE = """\
import signal, sys
from pathlib import Path
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import serve
with serve(Path(sys.argv[1]), ServeOptions(port=0, metrics_port=None)) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with the toy in it, and a release built by it."""
    root = tmp_path_factory.mktemp("toy").resolve()
    for package in ("ensemble", "builders", "clients"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "peregrine.py", root)
    contract = (root / "ensemble" / "contract.py").read_text()
    for old, new in EDITS:
        assert contract.count(old) == 1, f"contract.py has changed: {old!r}"
        contract = contract.replace(old, new)
    (root / "ensemble" / "contract.py").write_text(contract)
    (root / "ensemble" / "text_encoder.py").write_text(TEXT_ENCODER)
    write_light_models(root)
    python(root, SHOP, str(root / "shop"))
    options = (
        "--preset",
        "tiny",
        "--no-refit",
        "--activate",
        "--repository",
        str(root / "repository"),
        *OPTIONS,
    )
    python(root, BUILD, "build", str(root / "shop"), *options)
    return root


def python(root: Path, code: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=root,
        env=one_thread(PYTHONPATH=str(root)),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]


@pytest.fixture(scope="module")
def url(tree: Path) -> Iterator[str]:
    command = [sys.executable, "-c", SERVE, str(tree / "repository")]
    server = subprocess.Popen(
        command,
        cwd=tree,
        env=one_thread(PYTHONPATH=str(tree)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    assert url, "the server did not start"
    yield url
    server.communicate("")
    assert server.returncode in (0, -signal.SIGTERM)


def test_the_toy_is_a_member_of_the_release(tree):
    assert (tree / "repository" / "r1_text_encoder" / "1" / "model.py").exists()
    ensemble = (tree / "repository" / "r1_recommend" / "config.pbtxt").read_text()
    assert (
        ensemble.index('"r1_user_encoder"')
        < ensemble.index('"r1_text_encoder"')
        < ensemble.index('"r1_recall"')
    )


def test_served_and_local_answers_are_the_same_and_the_toy_counts(tree, url, tmp_path):
    users = [f"u{n}" for n in range(1, 41)] + ["nobody"]
    python(tree, ASK_TWIN, str(tree), " ".join(users), str(tmp_path / "twin.npz"))
    asker = TritonAsker(url)
    served = asker.ask([u.encode() for u in users], {})
    asker.close()
    with np.load(tmp_path / "twin.npz") as twin:
        for name in OUTPUTS:
            if twin[name].dtype.kind == "S":
                assert served[name].astype("S").tolist() == twin[name].tolist(), name
            else:
                np.testing.assert_allclose(served[name], twin[name], rtol=0, atol=1e-5, err_msg=name)
        lists = {tuple(ids) for ids in twin["item_ids"].tolist()}
    assert len(lists) > 20
    assert all(b"" not in ids for ids in lists)


def test_recall_searches_with_what_the_toy_gives(tree):
    """The item nearest to the toy's vector is a candidate, whatever the user encoder says."""
    code = (
        "import sys, numpy as np; from pathlib import Path; from ensemble.local import LocalPipeline; from "
        "ensemble.steps.served import open_served\n"
        "from ensemble.options import default_options\n"
        "p = LocalPipeline(open_served(Path(sys.argv[1]), 'r1')); ids = p.release.user_ids.sorted_ids[:30]\n"
        "known = {'user_id': ids[:, None]}\n"
        "for name in ('features', 'user_encoder', 'text_encoder', 'recall'):\n"
        "    known |= p.steps[name].run(default_options(30), **{t.name: known[t.name] for t in "
        "p.spec.model(name).inputs})\n"
        "scores = known['text_embeddings'][:, 0] @ p.release.items['embedding'].T\n"
        "for user, seen in enumerate(known['seen_rows']):\n"
        "    scores[user, [0, *seen[seen > 0]]] = -np.inf\n"
        "assert all(best in rows for best, rows in zip(scores.argmax(1), known['candidate_rows']))\n"
    )
    python(tree, code, str(tree / "repository"))
