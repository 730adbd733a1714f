"""Encoders are tuned on the products that train alone."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from builders.bench.tuned_encoders import Products
from builders.content.sources import EFFICIENTNET, MINILM, is_installed


@pytest.mark.skipif(
    not (is_installed(MINILM) and is_installed(EFFICIENTNET)), reason="pretrained encoders are not installed"
)
def test_no_product_that_tests_is_tuned_on(tmp_path: Path):
    folder = tmp_path / "mm_fashion_small"
    folder.mkdir()
    with (folder / "items.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["product_id", "title", "article_type", "master_category"])
        for at in range(100):
            table.writerow([at, f"Berry Shirt {at}", "Shirts", "Apparel" if at % 2 else "Footwear"])
    with zipfile.ZipFile(folder / "images.zip", "w") as file:
        for at in range(100):
            file.writestr(f"images/{at}.jpg", f"picture {at}")
    products = Products(tmp_path)
    material = products.material()
    trains = np.flatnonzero(products.trains)
    assert len(material) == len(trains) == 80
    titles, pictures = (view.read(range(80)) for view in material.views)
    assert titles == [f"Berry Shirt {at}" for at in trains]
    assert pictures == [f"picture {at}".encode() for at in trains]
    assert material.groups.tolist() == [int(at % 2 != trains[0] % 2) for at in trains]
    assert 0 < material.held.sum() < 20
    assert products.masked[0] == "Berry 0"
