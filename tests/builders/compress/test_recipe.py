"""Presets are read, and every mistake is one line that names the file, the key, the value and the cure."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from builders.compress import recipe
from builders.compress.recipe import Gate, Recipe, read_recipe
from ensemble.errors import InvalidInput

README = Path(recipe.__file__).with_name("README.md")


def _written(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_every_preset_reads_and_only_none_does_nothing():
    recipes = {name: read_recipe(name) for name in recipe.PRESETS}
    assert [name for name, of in recipes.items() if of.is_empty] == ["none"]
    assert [name for name, of in recipes.items() if of.keeps_weights] == ["none", "balanced"]
    assert recipes["small"].gate.ranking == 0.01
    assert recipes["fast"].ranker.prune.share == 0.5


def test_the_example_in_the_readme_is_a_recipe_that_says_what_it_says(tmp_path):
    (example,) = re.findall(r"^```toml\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    found = read_recipe(_written(tmp_path, example))
    assert found.of("ranker").distil.student == {"hidden": 96, "expert": (64, 32)}
    assert (found.ranker.prune.method, found.ranker.prune.share, found.ranker.prune.round_to) == (
        "structured",
        0.5,
        16,
    )
    assert found.ranker.quantize.pinned == {"node_linear_7": "fp32"}
    assert found.ranker.quantize.tensorrt == ("int8", "fp16", "fp32")
    assert found.gate == Gate()
    assert found.user_encoder.keeps_weights
    assert not found.ranker.keeps_weights


def test_the_example_in_the_readme_has_every_key_and_the_gates_own_limits(tmp_path):
    (example,) = re.findall(r"^```toml\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    read = tomllib.loads(example)
    assert set(read) == set(recipe.Recipe.model_fields) - {"user_encoder", "item_encoder"}
    for step, kind in (("distil", recipe.Distil), ("prune", recipe.Prune), ("quantize", recipe.Quantize)):
        assert set(read["ranker"][step]) == set(kind.model_fields) - {"threshold"}
    assert read["gate"] == Gate().model_dump()


def test_limits_are_the_documented_ones():
    assert (Gate().ranking, Gate().auc, Gate().overlap, Gate().slices, Gate().slice_users) == (
        0.005,
        0.002,
        0.95,
        0.03,
        2000,
    )


def test_a_recipe_cannot_be_changed_and_its_facts_make_it_again():
    found = read_recipe("small")
    with pytest.raises(ValueError, match="frozen"):
        found.seed = 3
    assert Recipe.model_validate(recipe.facts(found)) == found


def test_a_students_widths_are_those_of_the_rankers_config():
    from builders.ranker.model import RankerConfig

    widths = recipe._student_widths("ranker")
    assert dataclasses.replace(RankerConfig(), **dict.fromkeys(widths, 16))
    assert {"hidden", "experts", "expert"} <= set(widths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[ranker.prune]\nmethod = "magic"',
            "ranker.prune.method = 'magic': should be 'magnitude', 'structured' or 'two_four'",
        ),
        (
            '[rankr.prune]\nmethod = "two_four"',
            "rankr: no such key; known here: seed, calibration_users, user_encoder, item_encoder, ranker, "
            "text_encoder, image_encoder, gate",
        ),
        (
            '[ranker.quantize]\nonnxruntime = ["int4"]',
            "ranker.quantize.onnxruntime.0 = 'int4': should be 'int8' or 'fp32'",
        ),
        (
            '[ranker.quantize]\ntensorrt = ["int4"]',
            "ranker.quantize.tensorrt.0 = 'int4': should be 'int8', 'fp8', 'fp16' or 'fp32'",
        ),
        (
            '[ranker.quantize]\npinned = {a = "fp99"}',
            "ranker.quantize.pinned.a = 'fp99': should be 'int8', 'fp8', 'fp16' or 'fp32'",
        ),
        ("[ranker.quantise]\n", "ranker.quantise: no such key; known here: distil, prune, quantize"),
        (
            "[ranker.quantize]\nbudget = {loss = 0.9}",
            "ranker.quantize.budget.loss = 0.9: should be less than or equal to 0.5",
        ),
        (
            "[ranker.quantize]\nbudget = {size = 0}",
            "ranker.quantize.budget.size = 0: should be greater than 0",
        ),
        (
            "[ranker.quantize]\nbudget = {latency = nan}",
            "ranker.quantize.budget.latency = nan: should be a finite number",
        ),
        (
            "[ranker.quantize]\nbudget = {loss = 0.1, size = 0.5}",
            "ranker.quantize.budget: a budget is exactly one of loss, size, latency; it has loss and size",
        ),
        (
            "[ranker.quantize]\nbudget = {}",
            "ranker.quantize.budget: a budget is exactly one of loss, size, latency; it has none",
        ),
        (
            '[ranker.prune]\nmethod = "magnitude"',
            "ranker.prune: method 'magnitude' needs share or threshold, such as share = 0.5",
        ),
        (
            '[ranker.prune]\nmethod = "magnitude"\nshare = 0.5\nthreshold = 1.0',
            "ranker.prune: share and threshold are two measures of the same",
        ),
        (
            '[ranker.prune]\nmethod = "structured"\nthreshold = 1.0',
            "ranker.prune: method 'structured' takes no threshold; leave it out",
        ),
        (
            '[ranker.prune]\nmethod = "two_four"\nshare = 0.5',
            "ranker.prune: method 'two_four' takes no share; leave it out (its share is one half)",
        ),
        ("[ranker.prune]\nshare = 0.5\nsteps = 3", "ranker.prune.method is missing"),
        (
            "[ranker.distil]\nstudent = {hiden = 8}",
            "ranker.distil.student.hiden: no such width; known here: codes, attention,",
        ),
        (
            "[ranker.distil]\nstudent = {hidden = 0}",
            "ranker.distil: student.hidden = 0: a size is at least 1",
        ),
        (
            "[ranker.distil]\nstudent = {hidden = 8}\nkd = 0",
            "ranker.distil: kd, at and rd are all 0: the student would",
        ),
        ("[item_encoder.distil]\nstudent = {mix = 8}", "item_encoder.distil: there is no student for it"),
        ("calibration_users = 3", "calibration_users = 3: should be greater than or equal to 8"),
        ("[gate]\nranking = -1", "gate.ranking = -1: should be greater than 0"),
        ("seed = 1\nranker = {quantize = {budget = }}", "is not TOML: Invalid value (at line 2, column 32)"),
        ("ranker = 5", "ranker = 5: should be a table"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_value_and_cure(tmp_path, text, message):
    with pytest.raises(InvalidInput, match=re.escape(message)) as error:
        read_recipe(_written(tmp_path, text))
    assert "\n" not in str(error.value)
    assert "recipe.toml" in str(error.value)


def test_an_unknown_name_lists_the_presets(tmp_path):
    with pytest.raises(
        InvalidInput,
        match="recipe tiny: no such file, and no preset; presets: none, balanced, small, fast",
    ):
        read_recipe("tiny")
    with pytest.raises(InvalidInput, match="no such file"):
        read_recipe(tmp_path)


def test_a_recipe_that_is_not_text_is_one_line(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match=r"recipe.toml is not UTF-8 \(byte 0\)"):
        read_recipe(path)
