"""The generated shop: the same for a seed, in order, and with a truth worth learning."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from shops import ROOT
from typer.testing import CliRunner

from builders.cli.shop import app
from builders.data.check import check_shop
from builders.data.dataset import Dataset
from builders.data.stage import load_dataset
from builders.metrics import auc
from builders.shop.generate import generate_shop
from builders.shop.planted import LAST_EVENT_S
from ensemble.errors import InvalidInput


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate") / "shop"
    generate_shop(out, users=1_500, items=300, events=90_000, seed=1, images=False)
    return out


@pytest.fixture(scope="module")
def dataset(shop: Path) -> Dataset:
    return load_dataset(shop)


def test_a_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        generate_shop(tmp_path / name, users=50, items=40, events=500, seed=int(name == "c"))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 5 + 40
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert (tmp_path / "a/interactions.parquet").read_bytes() != (
        tmp_path / "c/interactions.parquet"
    ).read_bytes()


def test_nothing_is_wrong_with_it(shop: Path) -> None:
    report = check_shop(shop)
    assert report.warnings == []
    assert report.sections["interactions"]["rows"] == 90_000
    assert report.sections["impressions"] == {"train": 72_000, "validation": 9_000, "test": 9_000}


def test_events_are_in_time_order_and_past(shop: Path) -> None:
    table = pq.read_table(shop / "interactions.parquet")
    times = table.column("time").to_numpy()
    assert (np.diff(times) >= 0).all()
    assert times.max() <= LAST_EVENT_S + 90_000 < time.time()
    pairs = np.char.add(np.char.add(table.column("user_id").to_numpy().astype("U"), " "), times.astype("U"))
    assert len(np.unique(pairs)) == len(pairs)


def test_truth_is_calibrated_and_far_above_popularity(dataset: Dataset) -> None:
    """The oracle's AUC is at least .05 above that of every item's own rate, the strongest popularity there
    is."""
    train, test = dataset.train_impressions, dataset.test_impressions
    assert train is not None
    assert test is not None
    assert test.truth is not None
    for at, margin in ((0, 0.05), (1, 0.05)):
        known = ~np.isnan(test.labels[:, at])
        labels, truth = test.labels[known, at], test.truth[known, at]
        assert abs(labels.mean() - truth.mean()) < 0.03
        learned = ~np.isnan(train.labels[:, at])
        shown = np.bincount(train.item_rows[learned], minlength=301)
        taken = np.bincount(train.item_rows[learned], weights=train.labels[learned, at], minlength=301)
        rate = (taken + 1) / (shown + 4)
        assert auc(labels, truth) - auc(labels, rate[test.item_rows[known]]) >= margin


def test_dwell_scatters_about_its_planted_mean(dataset: Dataset) -> None:
    train = dataset.train_impressions
    assert train is not None
    assert train.truth is not None
    clicked = train.labels[:, 0] == 1
    error = train.labels[clicked, 2] - train.truth[clicked, 2]
    assert abs(error.mean()) < 0.02
    assert 0.57 < error.std() < 0.63


def test_tastes_jump_from_lipstick_to_remover(dataset: Dataset) -> None:
    category = dataset.schema.items.category("category")
    assert category is not None
    codes = dataset.item_codes[dataset.histories.item_rows, category.start] - category.offset - 1
    words = np.array(dataset.vocabularies["items"]["category"])[codes]
    same = np.ones(len(words) - 1, bool)
    same[dataset.histories.offsets[1:-1][dataset.histories.offsets[1:-1] < len(words)][1:] - 1] = False
    after_lipstick = words[1:][same & (words[:-1] == "lipstick")]
    assert (after_lipstick == "remover").mean() > 2 * (words == "remover").mean()


def test_images_show_the_shade(tmp_path: Path) -> None:
    from PIL import Image

    generate_shop(tmp_path / "shop", users=20, items=80, events=200, seed=0, images=True)
    items = pq.read_table(tmp_path / "shop/items.parquet").to_pydict()
    centre = {"red": [], "clear": []}
    for shade, path in zip(items["shade"], items["image"], strict=True):
        pixels = np.asarray(Image.open(tmp_path / "shop" / path))
        assert pixels.shape == (48, 48, 3)
        if shade in centre:
            centre[shade].append(pixels[20:28, 20:28].mean((0, 1)))
    assert np.mean(centre["red"], 0)[1] < 80 < np.mean(centre["clear"], 0)[1]


def test_a_million_items_need_no_loop(tmp_path: Path) -> None:
    began = time.perf_counter()
    generate_shop(tmp_path / "shop", users=2_000, items=200_000, events=50_000, seed=0)
    assert time.perf_counter() - began < 30
    assert not (tmp_path / "shop/images").exists()


def test_an_existing_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/mine.txt").write_text("dear")
    with pytest.raises(InvalidInput) as caught:
        generate_shop(tmp_path / "shop", users=20, items=30, events=200)
    assert (
        str(caught.value) == f"{tmp_path / 'shop'} exists already; give another name or --force to replace it"
    )
    assert (tmp_path / "shop/mine.txt").read_text() == "dear"
    generate_shop(tmp_path / "shop", users=20, items=30, events=200, force=True)
    assert not (tmp_path / "shop/mine.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["shop"]


def test_a_killed_generate_leaves_nothing_under_its_name(tmp_path: Path) -> None:
    out = tmp_path / "shop"
    program = "import pathlib, builders.shop.generate as g; "
    program += f"g.generate_shop(pathlib.Path({str(out)!r}), items=5000, events=400_000, images=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".shop.partial-*/images")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    generate_shop(out, users=20, items=30, events=200)
    assert [p.name for p in tmp_path.iterdir()] == ["shop"]


def test_the_command_line_generates_and_checks(tmp_path: Path) -> None:
    out = str(tmp_path / "shop")
    run = CliRunner().invoke(
        app, ["generate", out, "--users", "30", "--items", "40", "--events", "600", "--no-images"]
    )
    assert run.exit_code == 0, run.output
    assert run.stdout == f"{out}: 30 users, 40 items, 600 interactions. Next: peregrine shop check {out}\n"
    check = CliRunner().invoke(app, ["check", out, "--json"])
    assert check.exit_code == 0
    assert '"rows": 600' in check.stdout
    again = CliRunner().invoke(app, ["generate", out])
    assert again.exit_code == 2
    assert again.stderr == f"error: {out} exists already; give another name or --force to replace it\n"
    few = CliRunner().invoke(app, ["generate", out + "2", "--items", "3"])
    assert (few.exit_code, few.stderr) == (2, "error: --items 3: at least 24\n")
    assert CliRunner().invoke(app, ["check", str(tmp_path)]).exit_code == 2
