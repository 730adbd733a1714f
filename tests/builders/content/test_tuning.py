"""Encoders are tuned on a shop's own items: what is written is read like any checkpoint, finds titles by
pictures, knows nothing of held-out items and test events, and is whole or not there."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from PIL import Image
from shops import ROOT
from typer.testing import CliRunner

from builders.cli.encoders import app
from builders.content.cache import keep_encoder
from builders.content.models import open_source
from builders.content.sources import EFFICIENTNET, Source, find_source, is_installed
from builders.content.tuning.folders import write_tower
from builders.content.tuning.material import Material, View, is_held_out
from builders.content.tuning.shop import clicked_together, material_of
from builders.content.tuning.towers import GROUPS, Tower
from builders.content.tuning.training import Limits, Training
from builders.content.tuning.tune import TuneOptions, tune_material, tune_shop
from builders.data.stage import load_dataset
from builders.shop.shop_toml import FeatureColumn
from ensemble.errors import InvalidInput

pytest.importorskip("transformers", reason="transformers is not installed (extra encoders)")
COLOURS = {
    "berry": (160, 20, 60), "coral": (250, 120, 90), "plum": (90, 30, 110), "cream": (250, 240, 210),
    "gloss": (20, 200, 60), "matte": (30, 30, 30), "velvet": (20, 40, 200), "soft": (240, 220, 20),
}  # fmt: skip
SHAPES = ("lipstick", "blush", "mask")
ITEMS, STEPS = 240, 24
TOML = """name = "colours"
split = "leave_one_out"
[interactions]
file = "log.csv"
[items]
file = "items.csv"
id = "item_id"
title = "title"
[[items.features]]
name = "shape"
kind = "category"
[[items.features]]
name = "title"
kind = "text"
encoder = "bert"
[[items.features]]
name = "image"
kind = "image"
encoder = "vit"
"""


def title_of(at: int) -> tuple[str, str]:
    return list(COLOURS)[at % len(COLOURS)], SHAPES[at % len(SHAPES)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop of colours: a picture shows what its title says, and users click items of one colour."""
    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    write_checkpoint(folder / "bert", "bert")
    write_checkpoint(folder / "vit", "vit")
    items = []
    for at in range(ITEMS):
        colour, shape = title_of(at)
        noise = rng.integers(-12, 12, (16, 16, 3))
        pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{at}.png")
        items.append([f"i{at:03}", f"{colour} {shape} {'abcdefgh'[at // 30]}", f"{at}.png", shape])
    write_csv(folder / "items.csv", ["item_id", "title", "image", "shape"], items)
    log = []
    for user in range(60):
        for at, near in enumerate(rng.permutation(ITEMS // len(COLOURS))[:6]):
            item = user % len(COLOURS) + len(COLOURS) * int(near)
            # the fourth event comes a day later: not with the same intention
            log.append([f"u{user:02}", f"i{item:03}", 1_700_000_000 + 60 * at + 86_400 * (at >= 3)])
    write_csv(folder / "log.csv", ["user_id", "item_id", "time"], log)
    (folder / "shop.toml").write_text(TOML)
    return folder


def write_csv(path: Path, names: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


@pytest.fixture(scope="module")
def tuned(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of one tuning, and its report."""
    out = tmp_path_factory.mktemp("tuned") / "encoders"
    said: list[str] = []
    report = tune_shop(TuneOptions(shop, out, 10, steps=STEPS), said.append, lambda share, text: None)
    assert said[0].startswith("a step of 128 items takes "), "what it will take is said first"
    return out, report


def source_of(kind: str, folder: Path) -> Source:
    return find_source(FeatureColumn(name="one", kind=kind, encoder=str(folder)), Path())


def test_a_picture_finds_its_title_and_a_title_its_picture(tuned):
    _, report = tuned
    before, after = report["figures"]["frozen"], report["figures"]["tuned"]
    chance = 10 / report["held_out"]
    assert report["held_out"] == sum(is_held_out([f"i{at:03}".encode() for at in range(ITEMS)]))
    assert after["picture -> text"] > max(2 * chance, before["picture -> text"])
    assert after["text -> picture"] > max(2 * chance, before["text -> picture"])
    assert after["true pairs"] > after["others"] + 0.3
    losses = [loss for _, loss in report["losses"]]
    assert report["gained"] == (min(losses) < losses[0])
    assert losses[[step for step, _ in report["losses"]].index(report["best_step"])] == min(losses)


def test_what_is_written_is_exported_like_any_checkpoint_and_shares_a_space(tuned, shop, tmp_path):
    out, report = tuned
    assert report["features"] == {"title": str(out / "text"), "image": str(out / "image")}
    image = keep_encoder(source_of("image", out / "image"), tmp_path).open(1)
    text = Tower(source_of("text", out / "text"), 1)  # reads what it was given, not the head that is there
    opened = open_source(text.source)
    assert image.facts.width == opened.width == 128
    assert image.facts.space == opened.space != ""
    held = [at for at in range(ITEMS) if is_held_out([f"i{at:03}".encode()])[0]]
    looks = image.encode([(shop / f"{at}.png").read_bytes() for at in held]).vectors
    words = opened.module(*text.tensors([" ".join(title_of(at)) for at in held])).numpy()
    np.testing.assert_allclose(np.linalg.norm(looks, axis=1), 1, atol=1e-4)
    nearest = (looks @ words.T).argmax(axis=1)
    right = [title_of(held[at])[0] == title_of(held[own])[0] for own, at in enumerate(nearest)]
    assert np.mean(right) > 0.5, "of eight colours"


def test_the_same_seed_and_steps_give_the_same_weights(shop, tmp_path):
    written = []
    for name in ("a", "b"):
        torch.rand(3)
        report = tune_shop(
            TuneOptions(shop, tmp_path / name, 10, steps=2), lambda line: None, lambda *_: None
        )
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        written.append([(path.name, path.read_bytes()) for path in files])
        assert report["steps"] == 2
    assert written[0] == written[1]


def test_events_of_the_test_and_of_another_day_are_no_pairs(shop):
    dataset = load_dataset(shop)
    pairs = clicked_together(dataset)
    ends = np.asarray(dataset.train_ends)
    known = {
        tuple(sorted((int(one), int(other))))
        for user in range(1, dataset.num_users + 1)
        for at in range(int(dataset.histories.offsets[user]), int(ends[user]) - 1)
        for one, other in [dataset.histories.item_rows[at : at + 2]]
        if dataset.histories.times[at + 1] - dataset.histories.times[at] < 1800
    }
    assert {tuple(pair) for pair in pairs.tolist()} == known
    assert len(known) > 100


def test_held_out_items_teach_nothing(shop):
    material = material_of(shop)
    towers = [Tower(view.source, 16) for view in material.views]
    training = Training(towers, material, 0, print)
    assert len(material) == ITEMS
    assert material.held.sum() == len(training.judges) > 10
    drawn = training._batches()
    seen = np.concatenate([next(drawn)[0] for _ in range(12)])
    assert not material.held[seen].any()
    assert set(seen.tolist()) == set(training.learns.tolist()), "all others are seen"
    items, pairs = next(drawn)
    together = {frozenset(pair) for pair in material.together.tolist()}
    assert all(frozenset(items[pair].tolist()) in together for pair in pairs)
    alone = np.setdiff1d(np.arange(len(items) // 2), pairs[:, 0])
    companions = items[alone + len(items) // 2]
    assert (material.groups[items[alone]] == material.groups[companions]).all(), "hard to tell apart"


def test_equal_inputs_are_no_negatives_of_each_other(shop):
    material = material_of(shop)
    view = material.views[0]
    keys = np.zeros(len(view.keys), np.int64)
    same = Material((View(view.feature, view.source, keys, view.read),) * 2, material.held, material.groups,
                    material.together)  # fmt: skip
    training = Training([Tower(view.source, 16)] * 2, same, 0, print)
    assert float(training._loss(next(training._batches())).detach()) == pytest.approx(0, abs=1e-6)


def test_a_gain_that_never_comes_leaves_the_start(shop, monkeypatch, tmp_path):
    losses = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(Training, "held_out_loss", lambda self: next(losses))
    report = tune_shop(TuneOptions(shop, tmp_path / "out", 10, steps=2), lambda line: None, lambda *_: None)
    assert not report["gained"]
    assert report["best_step"] == 0
    own = open_source(source_of("image", shop / "vit")).module.inner.state_dict()
    left = open_source(source_of("image", tmp_path / "out" / "image")).module.inner.state_dict()
    assert all(torch.equal(own[name], left[name]) for name in own if "pooler" not in name)


def test_layers_thaw_from_the_top(shop):
    tower = Tower(source_of("text", shop / "bert"), 16)
    groups = tower.layers()
    names = {id(p): name for name, p in tower.module.inner.named_parameters()}
    top, bottom = ([names[id(p)] for p in groups[at]] for at in (0, -1))
    assert len(groups) == min(GROUPS, 2)
    assert any("layer.1." in name for name in top)
    assert any("word_embeddings" in name for name in bottom)
    assert sum(map(len, groups)) == len(names)


def test_a_single_view_learns_from_clicks_alone(shop, tmp_path):
    own = tmp_path / "shop"
    shutil.copytree(shop, own)
    (own / "shop.toml").write_text(TOML.replace('encoder = "bert"\n', ""))
    report = tune_shop(TuneOptions(own, tmp_path / "out", 10, steps=2), lambda line: None, lambda *_: None)
    assert list(report["figures"]["tuned"]) == [
        "true pairs",
        "others",
        "item -> clicked with it",
        "clicked with it -> item",
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["image"]


@pytest.mark.skipif(not is_installed(EFFICIENTNET), reason="efficientnet-lite0 is not installed")
def test_efficientnet_lite0_is_a_folder_too(tmp_path):
    """Its folder says how large its pictures are, as it reads any size."""
    source = find_source(FeatureColumn(name="image", kind="image", encoder=EFFICIENTNET), tmp_path)
    tower = Tower(source, 16)
    write_tower(tower, tmp_path / "lite")
    config = tmp_path / "lite" / "config.json"
    assert json.loads(config.read_text()) == {"model_type": EFFICIENTNET, "image_size": 224}
    config.write_text(config.read_text().replace("224", "96"))
    opened = open_source(source_of("image", tmp_path / "lite"))
    assert (opened.side, opened.width) == (96, 16)
    pixels = torch.rand(1, 3, 96, 96)
    tower.module.eval()
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(tower.head(tower.module(pixels)), dim=-1)
        torch.testing.assert_close(opened.module(pixels), wanted, atol=1e-4, rtol=1e-4)
    again = Tower(source_of("image", tmp_path / "lite"), 8)
    assert again.head.map.in_features == 1280, "tuned once more, it gets another head"


def _no_pictures(shop: Path) -> None:
    for path in shop.glob("*.png"):
        path.unlink()


def _no_titles(shop: Path) -> None:
    rows = list(csv.reader((shop / "items.csv").open()))
    write_csv(shop / "items.csv", rows[0], [[one, " ", image, shape] for one, _, image, shape in rows[1:]])


def _own_class(shop: Path) -> None:
    (shop / "mine.py").write_text(
        "from torch import nn\nclass Mine(nn.Module):\n    width, side = 8, 32\n"
        "    def __init__(self):\n        super().__init__()\n        self.map = nn.Linear(3, 8)\n"
        "    def forward(self, pixels):\n        return self.map(pixels.mean((2, 3)))\n"
    )
    (shop / "shop.toml").write_text(TOML.replace('"vit"', '"mine:Mine"'))


def _no_encoders(shop: Path) -> None:
    (shop / "shop.toml").write_text(TOML.replace('encoder = "bert"\n', "").replace('encoder = "vit"\n', ""))


def _few(shop: Path) -> None:
    for at in range(50, ITEMS):
        (shop / f"{at}.png").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_pictures, "no item has a picture's file in 'image', which the feature 'image' encodes"),
        (_no_titles, "no item has a text in 'title', which the feature 'title' encodes"),
        (_own_class, "encoder 'mine:Mine' is a module of your own, which only its own code can write again"),
        (_no_encoders, "shop.toml names no encoder of its items' texts or images"),
        (_few, "50 items have both 'title' and 'image', and 72 are needed"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(shop, tmp_path, damage, message):
    own = tmp_path / "shop"
    shutil.copytree(shop, own)
    damage(own)
    with pytest.raises(InvalidInput, match="^" + message.replace("(", r"\(")) as caught:
        tune_shop(TuneOptions(own, tmp_path / "out", 1), lambda line: None, lambda *_: None)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shop"], "nothing is left behind"


def test_a_folder_that_exists_or_cannot_be_written_is_one_line(shop, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "one").touch()
    for out, message in (
        (tmp_path / "full", "full exists already; give another name"),
        (tmp_path / "full" / "one" / "out", "out cannot be written: File exists"),
        (Path("/proc/encoders"), "/proc/encoders cannot be written: "),
    ):
        with pytest.raises(InvalidInput, match=message):
            tune_shop(TuneOptions(shop, out, 1), lambda line: None, lambda *_: None)


def test_stopped_half_way_it_leaves_nothing(shop, tmp_path):
    def interrupted(share: float, text: str) -> None:
        if text.startswith("tuning: step 1"):
            assert [path.name for path in tmp_path.iterdir()] == [f".out.partial-{os.getpid()}"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_shop(TuneOptions(shop, tmp_path / "out", 10), lambda line: None, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_was_gained_and_what_to_write(shop, tmp_path):
    out = tmp_path / "encoders"
    done = CliRunner().invoke(app, ["tune", str(shop), "--out", str(out), "--minutes", "0.05", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["figures"].keys() == {"frozen", "heads alone", "tuned"}
    assert "held-out items" in done.stderr
    assert f'in shop.toml, feature image: encoder = "{out / "image"}"' in done.stderr


@pytest.mark.long
def test_killed_half_way_it_leaves_no_folder_and_the_next_one_sweeps(shop, tmp_path):
    out = tmp_path / "encoders"
    command = [sys.executable, "-u", "-m", "peregrine", "encoders", "tune", str(shop), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert any("a step of" in line for line in process.stderr), "it came to its training"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == [f".encoders.partial-{process.pid}"]
    tune_shop(TuneOptions(shop, out, 10, steps=1), lambda line: None, lambda *_: None)
    assert [path.name for path in tmp_path.iterdir()] == ["encoders"]


def test_a_training_that_the_time_cuts_short_is_judged_at_its_end(shop):
    now, pace = [0.0], [0.01]

    def clock() -> float:
        now[0] += pace[0]
        return now[0]

    def slower(share: float, text: str) -> None:
        if text.startswith("tuning: step 2 "):
            pace[0] = 1000.0

    limits = Limits(100, clock=clock, began=0.0)
    _, report = tune_material(material_of(shop), 0, limits, lambda line: None, slower)
    assert report["steps"] == 2
    assert [step for step, _ in report["losses"]] == [0, 2]
