"""No label of the test reaches a model, and nothing but labels makes a figure.

Shuffled labels of test rows change no artefact of training; shuffled labels of training rows teach nothing
about the test, whose labels are left as they are.
"""

import json
from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_dataset import zero_scores

from builders.data.dataset import Dataset, open_schema, save_dataset, training_histories
from builders.data.refit import refit_dataset
from builders.data.stage import load_dataset
from builders.encoders import stage as encoders
from builders.encoders.encoders import EncoderConfig
from builders.ranker.checkpoint import save_ranker
from builders.ranker.config import TINY_TRAINING
from builders.ranker.model import TINY
from builders.ranker.training import train_ranker
from builders.shop.generate import generate_shop
from ensemble.schema import Sizes

LABELS = ["clicked", "bought", "dwell_s"]
SIZES = Sizes(seen=20, history=8, embedding=16, candidates=12, item_features=8, user_features=8)
CONFIG = replace(TINY_TRAINING, epochs=1, batch=256, tried_rows=((1e-4, 0.5),))
T_OF_4 = 2.776  # Student's t at 97.5% of five runs


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leaks") / "shop"
    generate_shop(folder, users=150, items=60, events=5000, images=False)
    return folder


def _shuffled(shop, target, rng, is_of):
    """Copies the shop with the labels of the rows that `is_of` picks by time dealt out anew among them."""
    target.mkdir()
    for path in shop.iterdir():
        (target / path.name).symlink_to(path)
    table = pq.read_table(shop / "interactions.parquet")
    order, rows = np.arange(len(table)), np.flatnonzero(is_of(table["time"].to_numpy()))
    order[rows] = rng.permutation(rows)
    for name in LABELS:
        at = table.column_names.index(name)
        table = table.set_column(at, name, table[name].take(pa.array(order)))
    (target / "interactions.parquet").unlink()
    pq.write_table(table, target / "interactions.parquet")
    return load_dataset(target, sizes=SIZES)


def _embeddings(dataset):
    return np.random.default_rng(0).normal(size=(dataset.num_items + 1, SIZES.embedding)).astype(np.float32)


def _artefacts(dataset, folder):
    """Runs the training of encoders and ranker; gives the bytes of all that they wrote but their figures on
    the test and how long they took, and of what they were given."""
    for name in ("data", "encoders", "ranker"):
        (folder / name).mkdir(parents=True)
    save_dataset(dataset, folder / "data")
    config = replace(EncoderConfig.tiny(), epochs=1)
    encoders.run(
        {"data": folder / "data"}, encoders.Options(config, None, 0), folder / "encoders", lambda *_: None
    )
    trained = train_ranker(dataset, _embeddings(dataset), scores=zero_scores, config=CONFIG)
    del trained.report["test"]
    save_ranker(trained, folder / "ranker", TINY)
    written = {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for name in ("encoders", "ranker")
        for path in (folder / name).iterdir()
        if path.name != "log.json"
    }
    log = json.loads((folder / "encoders" / "log.json").read_text())
    written["log"] = [{name: of for name, of in line.items() if "second" not in name} for line in log]
    given = {name: (folder / "data" / name).read_bytes() for name in ("item_codes.npy", "item_values.npy")}
    return written | given | {f"training/{n}": part.tobytes() for n, part in _parts(dataset).items()}


def _parts(dataset: Dataset):
    """What may be learned from, with places in histories counted from each user's own first event."""
    offsets, items = training_histories(dataset)
    found = {"offsets": offsets, "items": items}
    for name in ("train_impressions", "validation_impressions"):
        part = getattr(dataset, name)
        own = {f.name: getattr(part, f.name) for f in fields(part) if getattr(part, f.name) is not None}
        own["history_ends"] = part.history_ends - dataset.histories.offsets[part.user_rows]
        del own["settled" if "settled" in own else "truth"]
        found |= {f"{name}.{field}": np.asarray(of) for field, of in own.items()}
    return found


def test_shuffled_labels_of_the_test_change_no_artefact_of_training(shop, tmp_path, rng):
    dataset = load_dataset(shop, sizes=SIZES)
    begins = int(dataset.test_impressions.times.min())
    shuffled = _shuffled(shop, tmp_path / "shop", rng, lambda times: times >= begins)
    test = shuffled.test_impressions.labels[:, 0]
    assert (test != dataset.test_impressions.labels[:, 0]).any(), "something was shuffled"
    first, second = (_artefacts(one, tmp_path / name) for name, one in (("a", dataset), ("b", shuffled)))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert open_schema(tmp_path / "a" / "data") == open_schema(tmp_path / "b" / "data")


def _auc(dataset):
    report = train_ranker(dataset, _embeddings(dataset), scores=zero_scores, config=CONFIG).report
    return report["test"]["ctr"]["auc"]


@pytest.mark.long
def test_shuffled_labels_of_training_teach_nothing_about_the_test(shop, tmp_path):
    begins = int(load_dataset(shop, sizes=SIZES).test_impressions.times.min())
    found = [
        _shuffled(shop, tmp_path / str(seed), np.random.default_rng(seed), lambda times: times < begins)
        for seed in range(5)
    ]
    aucs = np.array([_auc(one) for one in found])
    half = T_OF_4 * aucs.std(ddof=1) / np.sqrt(len(aucs))
    assert aucs.mean() - half < 0.5 < aucs.mean() + half, aucs
    assert half < 0.05, "five runs tell"
    # the same, of a model that has learned from the test: what a leak looks like
    leaky = np.array([_auc(refit_dataset(one)) for one in found])
    gain = leaky - aucs
    assert gain.mean() > T_OF_4 * gain.std(ddof=1) / np.sqrt(len(gain))
