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
from builders.content import sources
from builders.data.check import check_shop
from builders.data.dataset import Dataset, Impressions
from builders.data.stage import load_dataset
from builders.metrics import auc
from builders.shop.generate import generate_shop
from builders.shop.planted import LAST_EVENT_S
from builders.shop.shop_toml import open_shop
from builders.shop.truth import open_truth
from ensemble.arrays import Array
from ensemble.errors import InvalidInput


@pytest.fixture(scope="module", params=["plain", "truer"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, plain = tmp_path_factory.mktemp("generate") / "shop", request.param == "plain"
    generate_shop(out, users=1_500, items=300, events=90_000, seed=1, images=False, plain=plain)
    return out


@pytest.fixture(scope="module")
def dataset(shop: Path) -> Dataset:
    return load_dataset(shop)


def test_a_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        generate_shop(tmp_path / name, users=50, items=40, events=500, seed=int(name == "c"))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 6 + 40
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert (tmp_path / "a/interactions.parquet").read_bytes() != (
        tmp_path / "c/interactions.parquet"
    ).read_bytes()


def test_nothing_is_wrong_with_it(shop: Path) -> None:
    report = check_shop(shop)
    assert report.warnings == []
    assert report.sections["interactions"]["rows"] == 90_000
    impressions = report.sections["impressions"]
    assert sum(impressions.values()) == 90_000
    assert abs(impressions["test"] - 9_000) < 8, "lists are not cut"


def test_events_are_in_time_order_and_past(shop: Path) -> None:
    columns = pq.read_table(shop / "interactions.parquet").to_pydict()
    times = np.array(columns["time"])
    assert (np.diff(times) >= 0).all()
    assert times.max() <= LAST_EVENT_S + 90_000 < time.time()
    shown = list(zip(columns["user_id"], columns["time"], columns["item_id"], strict=True))
    assert len(set(shown)) == len(shown)
    if "position" not in columns:
        assert len({row[:2] for row in shown}) == len(shown), "one at a time"
        return
    assert columns["position"][0] == 1
    lists = np.array([user + str(when) for user, when, _ in shown])
    follows, places = lists[1:] == lists[:-1], np.array(columns["position"])
    np.testing.assert_array_equal(places[1:], np.where(follows, places[:-1] + 1, 1))


def test_the_planted_truth_gives_what_labels_were_drawn_from(shop: Path) -> None:
    """Each row's probabilities come again from truth.npz alone: user, item, time and place."""
    columns, truth = pq.read_table(shop / "interactions.parquet").to_pydict(), open_truth(shop / "truth.npz")
    users, items = truth.rows_of(np.array(columns["user_id"], "S"), np.array(columns["item_id"], "S"))
    positions = np.array(columns["position"])[:, None] if "position" in columns else None
    found = truth.tasks(users, np.array(columns["time"]), items[:, None], positions)[:, 0]
    drawn = pq.read_table(shop / "truth.parquet").to_pydict()
    np.testing.assert_allclose(
        found, np.stack([drawn[name] for name in ("ctr", "cvr", "dwell")], 1), atol=1e-6
    )
    whole = truth.tasks(users[:5], np.array(columns["time"][:5]), np.arange(300)[None])
    first = whole[np.arange(5), items[:5]] if positions is None else whole[[0], items[:1]]
    np.testing.assert_allclose(first, found[: len(first)], atol=1e-6)
    assert truth.rows_of(np.array([b"nobody"]), np.array([b"i1"]))[0].tolist() == [-1]


def test_what_is_knowable_lies_between_two_rates_and_the_oracle(shop: Path, dataset: Dataset) -> None:
    truth, test, train = open_truth(shop / "truth.npz"), dataset.test_impressions, dataset.train_impressions
    assert test is not None
    assert train is not None
    assert test.truth is not None
    users, items = truth.rows_of(dataset.user_ids[test.user_rows - 1], dataset.item_ids[test.item_rows - 1])
    positions = None if not test.positions.any() else test.positions[:, None]
    known = truth.tasks(users, test.times, items[:, None], positions, known=True)[:, 0]
    for task in (0, 1):
        labels = test.labels[:, task]
        oracle, knowable = auc(labels, test.truth[:, task]), auc(labels, known[:, task])
        rates = auc(labels, _two_rates(train, test, task))
        assert oracle + 0.002 >= knowable > rates + 0.6 * (oracle - rates)
        if positions is not None:
            assert knowable < oracle - 0.005, "single effects cannot be known for sure"


def _two_rates(train: Impressions, test: Impressions, task: int) -> Array:
    """The sum of the log odds of a user's and an item's smoothed rate."""
    known = ~np.isnan(train.labels[:, task])
    score = np.zeros(len(test.times))
    for name in ("user_rows", "item_rows"):
        rows, asked = getattr(train, name)[known], getattr(test, name)
        size = max(rows.max(), asked.max()) + 1
        happened = np.bincount(rows, train.labels[known, task], size) + 5 * train.labels[known, task].mean()
        rate = happened / (np.bincount(rows, minlength=size) + 5)
        score += np.log(rate / (1 - rate))[asked]
    return score


def test_a_shop_has_what_real_ones_have(shop: Path) -> None:
    columns, effects = (
        pq.read_table(shop / "interactions.parquet").to_pydict(),
        open_truth(shop / "truth.npz").effects,
    )
    if not effects.changes:
        return
    times, clicked, bought = (np.array(columns[name]) for name in ("time", "clicked", "bought"))
    users, items = (np.array([int(name[1:]) - 1 for name in columns[of]]) for of in ("user_id", "item_id"))
    places = np.array(columns["position"])
    by_place = np.array([clicked[places == place].mean() for place in range(1, 9)])
    assert (np.diff(by_place) < 0).all(), "what stands lower is looked at less"
    assert 0.25 < by_place[-1] / by_place[0] < 0.45

    pairs = users * 300 + items
    assert len(np.unique(pairs[bought == 1])) < 0.95 * bought.sum(), "people buy again"
    assert (effects.launched[items] <= times).all(), "nothing is shown before it is there"
    assert (times - 86_400 < effects.gone[items]).all()
    late = effects.launched > times[0] + 86_400
    assert 0.1 < late.mean() < 0.4
    assert 0.02 < (effects.gone < times[-1]).mean() < 0.3

    early = times < np.quantile(times, 0.5)
    first, _ = (np.bincount(items[part & (clicked == 1)], minlength=300) for part in (early, ~early))
    shown = np.bincount(items[~early], minlength=300)
    stays = ~late & (effects.gone > times[-1])
    assert np.corrcoef(first[stays], shown[stays])[0, 1] > 0.6, "what was clicked is shown"
    for own, of, count in ((effects.item_click, items, 300), (effects.user_click, users, 1_500)):
        rate = np.bincount(of, clicked, count) / np.maximum(np.bincount(of, minlength=count), 1)
        assert np.corrcoef(own, rate)[0, 1] > 0.3, "single items and users differ"


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
    assert dataset.train_impressions is not None
    more = 1.15 if dataset.train_impressions.positions.any() else 2  # lists show both at once
    assert (after_lipstick == "remover").mean() > more * (words == "remover").mean()


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
    generate_shop(tmp_path / "shop", users=1_000, items=100_000, events=25_000, seed=0)
    assert time.perf_counter() - began < 20
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
    program += (
        f"g.generate_shop(pathlib.Path({str(out)!r}), items=5000, events=50_000, images=True, plain=True)"
    )
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


@pytest.mark.parametrize("installed", [True, False])
def test_titles_and_pictures_are_read_by_pretrained_encoders_where_they_are_installed(
    installed, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "is_installed", lambda name: installed)
    out = tmp_path / "shop"
    options = ["--users", "30", "--items", "24", "--events", "300"]
    assert CliRunner().invoke(app, ["generate", str(out), *options]).exit_code == 0
    encoders = {f.name: f.encoder for f in open_shop(out).items.features if f.encoder}
    assert encoders == ({"title": "minilm", "image": "efficientnet-lite0"} if installed else {})
    plain = CliRunner().invoke(app, ["generate", str(out), *options, "--no-encoders", "--force"])
    assert plain.exit_code == 0
    assert {f.encoder for f in open_shop(out).items.features} == {None}
