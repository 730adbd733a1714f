"""Encoders of texts and pictures go to 8 bits, judged by what a search finds with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from shops import private_copy

from builders.build import BuildOptions, build
from builders.compress.contents import SmallerEncoder, smaller_encoder
from builders.compress.recipe import CONTENT, ContentQuantize, Gate, LossBudget, read_recipe
from builders.content.samples import MOST, read_samples, write_samples
from builders.data.dataset import open_dataset
from builders.presets import preset
from ensemble.errors import InvalidInput
from ensemble.local import LocalPipeline
from ensemble.steps.served import open_served

WIDE = ContentQuantize(budget=LossBudget(loss=0.5))  # of two random layers of 32 channels


@pytest.fixture(scope="module")
def stages(pictured_shop: Path) -> dict[str, Path]:
    """The folders of the data stage and of the verified release."""
    repository = pictured_shop.parent / "repository"
    manifest = json.loads((repository / "r1" / "manifest.json").read_text())
    return {name: (repository / path).resolve() for name, path in manifest["stages"].items()}


def test_samples_are_kept_by_feature_whatever_it_is_called(tmp_path):
    assert read_samples(tmp_path, "title") == []
    write_samples({"a/b": [b"one", b"\xff\x00"], "a": [b"two"]}, tmp_path)
    assert read_samples(tmp_path, "a/b") == [b"one", b"\xff\x00"]
    assert read_samples(tmp_path, "a") == [b"two"]


@pytest.mark.parametrize("model", CONTENT)
def test_a_rounded_encoder_is_judged_by_the_items_that_it_finds(model, stages):
    dataset = open_dataset(stages["data"])
    kept = {f.encoder: read_samples(stages["data"], f.name) for f in dataset.schema.items.features}
    assert 24 <= len(kept[model]) <= MOST
    found = smaller_encoder(dataset, stages["data"], stages["verified"], model, WIDE, Gate(ranking=0.5))
    assert isinstance(found, SmallerEncoder), found
    assert [row.figure for row in found.rows] == [
        f"{model} {of}" for of in ("NDCG@10", "R@10", "top-10 overlap")
    ]
    assert all(row.reference > 0 and row.verdict != "FAIL" for row in found.rows)
    assert [(one.model, one.batch) for one in found.timings] == [(model, 1), (model, 8)]
    served = [variant for variant in found.choice.variants if variant["chosen"]]
    precisions = {node["precision"] for node in found.choice.nodes}
    if any(
        "stay at fp32" in note for note in found.choice.notes
    ):  # slower than fp32, as here and there it is
        assert precisions == {"fp32"}
    else:
        assert precisions == {"int8"}
        assert served[0]["bytes"] < found.choice.variants[0]["bytes"]


def test_a_shop_without_such_an_encoder_says_so(stages, tmp_path):
    dataset = open_dataset(stages["data"])
    text = CONTENT[0]
    assert smaller_encoder(dataset, tmp_path, stages["verified"], text, WIDE, Gate()) == (
        "text_encoder: stays as it is, 0 samples are too few to judge by"
    )
    assert smaller_encoder(dataset, tmp_path, stages["verified"], "audio_encoder", WIDE, Gate()) == (
        "audio_encoder: this shop has none"
    )


def test_what_cannot_be_done_to_a_frozen_encoder_is_refused(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[text_encoder.prune]\nmethod = 'two_four'\n")
    with pytest.raises(InvalidInput, match=r"recipe\.toml.*text_encoder\.prune"):
        read_recipe(path)


@pytest.mark.long
def test_a_release_with_rounded_encoders_searches_like_any_other(pictured_shop, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("".join(f"[{one}.quantize]\nbudget = {{loss = 0.5}}\n" for one in CONTENT))
    repository = tmp_path / "repository"
    private_copy(pictured_shop.parent / "repository", repository)
    options = BuildOptions(
        pictured_shop, repository, preset("tiny"), recipe=read_recipe(recipe), recipe_name="mine", refit=False
    )
    release = open_served(repository, build(options, Console(quiet=True))[0])
    told = release.manifest["report"]["compress"]
    assert {size["model"] for size in told["engines"]} >= set(CONTENT)
    assert {row["figure"].split()[0] for row in told["gates"]["onnxruntime"]["rows"]} >= set(CONTENT)
    title = next(title for title in release.item_titles[1:] if title).decode()
    found = LocalPipeline(release, "search").search(["u1"], [title])
    item = release.item_ids.ids_from_rows(np.flatnonzero(release.item_titles == title.encode())[:1])[0]
    assert item in found["item_ids"][0, :3]
