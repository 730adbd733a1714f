"""Context columns of a shop's log: read for each exposure, as requests will be, and kept with it."""

import json

import numpy as np
import pytest

from builders.data.check import check_shop
from builders.data.dataset import open_dataset, save_dataset, some_contexts
from builders.data.refit import refit_dataset
from builders.data.stage import load_dataset
from builders.verify.plain_features import joined, plain_features
from ensemble.activity import context_columns
from ensemble.errors import InvalidInput
from ensemble.options import parse_options

TOML = """name = "toy"
split = "time"
[interactions]
file = "log.csv"
[context]
features = [
  {name = "device", kind = "category", column = "dev", vocabulary = 2},
  {name = "amount", kind = "number", log1p = true},
]
[[tasks]]
name = "click"
label = {column = "clicked"}
"""
DEVICES = ["phone", "phone", "phone", "tv", "tv", "watch", ""]


def _write(folder, rng, toml=TOML, amounts=None):
    lines = ["user_id,item_id,time,clicked,dev,amount"]
    told = []
    for row in range(400):
        device = DEVICES[row % 7]
        amount = "" if row % 5 == 0 else str(row % 9) if amounts is None else amounts
        told.append((device, amount))
        lines.append(
            f"u{rng.integers(8)},i{rng.integers(6)},{1_700_000_000 + row},{rng.integers(2)},{device},{amount}"
        )
    order = rng.permutation(400)  # a file's rows need no order
    (folder / "log.csv").write_text("\n".join([lines[0], *[lines[1 + row] for row in order]]))
    (folder / "shop.toml").write_text(toml)
    return told


def test_the_check_says_what_share_of_cells_a_feature_has(rng, tmp_path):
    """Also where a word or blanks stand for nothing: R's NA, an empty text in quotes."""
    _write(tmp_path, rng)
    items = [f"i{at},{'NA' if at % 2 else at},{'' if at % 3 else 'x'}" for at in range(6)]
    (tmp_path / "items.csv").write_text("\n".join(["item_id,size,brand", *items]))
    features = '[{name = "size", kind = "number"}, {name = "brand", kind = "category"}]'
    table = f'[items]\nfile = "items.csv"\nid = "item_id"\nfeatures = {features}\n'
    (tmp_path / "shop.toml").write_text(TOML + table)
    assert check_shop(tmp_path).sections["items' features"] == {
        "size": "number, 50.0% filled",
        "brand": "category, 33.3% filled, 1 values",
    }


def test_each_exposure_has_what_its_row_says(rng, tmp_path):
    told = _write(tmp_path, rng)
    dataset = load_dataset(tmp_path)
    device, amount = dataset.schema.context
    assert (device.name, device.values) == ("device", ("phone", "tv"))
    assert (amount.kind, amount.log1p) == ("number", True)
    parts = (dataset.train_impressions, dataset.validation_impressions, dataset.test_impressions)
    every = joined(parts)
    assert len(every.times) == 400
    for time, contexts in zip(every.times, every.contexts, strict=True):
        name, number = told[time - 1_700_000_000]
        said = {"device": name or None, "amount": number or None}
        wanted = parse_options(json.dumps({"context": json.dumps(said)}), 1, dataset.schema).contexts(2)[0]
        np.testing.assert_allclose(contexts, wanted, rtol=1e-5)
    save_dataset(dataset, tmp_path)
    opened = open_dataset(tmp_path)
    assert opened.schema == dataset.schema
    np.testing.assert_array_equal(opened.test_impressions.contexts, parts[2].contexts)
    assert len(refit_dataset(opened).train_impressions.contexts) == 400
    given = some_contexts(opened, np.arange(8))
    assert (given[:, None] == parts[0].contexts[None]).any(1).any(1).all() or np.isnan(given).any()
    averages = np.array([0.5])
    plain = plain_features(dataset, every, np.arange(400), averages)
    column = plain.values[:, plain.names.index("context_device_category")]
    np.testing.assert_array_equal(column, every.contexts[:, 0])
    assert check_shop(tmp_path).sections["context"] == {
        "device": "category, 85.8% filled, 2 values",
        "amount": "number, 80.0% filled",
    }
    told_by = context_columns(dataset.schema)
    assert told_by.stop - told_by.start == 3 + 2


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('label = {column = "clicked"}\n', "", "no task has a label"),
        ('name = "amount"', 'name = "device"', "two context features are called 'device'"),
        ('"category"', '"text"', "'category' or 'number'"),
        ('column = "dev"', 'column = "gone"', "gone"),
    ],
)
def test_a_wrong_context_is_refused_by_name(rng, tmp_path, old, new, text):
    _write(tmp_path, rng, TOML.replace(old, new, 1))
    with pytest.raises(InvalidInput) as caught:
        load_dataset(tmp_path)
    assert text in str(caught.value)


def test_a_wrong_cell_is_named_with_its_row_in_the_file(rng, tmp_path):
    _write(tmp_path, rng, amounts="-3")
    with pytest.raises(InvalidInput, match=r"column 'amount', row .*'-3' is negative"):
        load_dataset(tmp_path)
