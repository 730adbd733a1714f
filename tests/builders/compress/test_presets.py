"""Every preset of `--compress` makes a release that answers."""

from __future__ import annotations

import io

import pytest
from real_builder import built_ahead
from rich.console import Console

from builders.build import BuildOptions, build
from builders.compress.recipe import MODELS, PRESETS, read_recipe
from builders.presets import preset
from ensemble.local import LocalPipeline
from ensemble.steps.served import open_served


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_asks_for_nothing_that_a_small_shop_could_not_reach(name):
    recipe = read_recipe(name)
    budgets = [part.quantize.budget for part in map(recipe.of, MODELS) if part.quantize is not None]
    assert all(budget.loss is not None for budget in budgets), (
        "a size or a time that cannot be met ends the build"
    )


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted({*PRESETS} - {"none"}))
def test_a_preset_makes_a_release_that_answers_and_that_nvidias_builder_takes(workshop, name, tmp_path):
    options = BuildOptions(
        workshop / "shop",
        workshop / "repository",
        preset("tiny"),
        recipe=read_recipe(name),
        recipe_name=name,
        refit=False,
    )
    release = build(options, Console(file=io.StringIO()))[0]
    answer = LocalPipeline(open_served(workshop / "repository", release)).recommend(["u1", "nobody"])
    assert (answer["item_ids"] != b"").all()
    assert len(built_ahead(workshop / "repository", release, tmp_path)) == 3
