"""What is searched follows the preset; what is found is a preset file that means the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.presets import PRESETS
from builders.settings import named_preset, preset_text, settings_of, with_settings
from builders.tune.space import changes_of, space_of, starting_point
from ensemble.errors import InvalidInput

optuna = pytest.importorskip("optuna")


@pytest.mark.parametrize("has_labels", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_the_start_is_within_its_bounds_and_every_bound_is_a_setting_that_builds(name, has_labels):
    preset = PRESETS[name]
    space = space_of(preset, has_labels=has_labels)
    start = starting_point(preset, space)
    assert len(space) > 10
    for setting, knob in space.items():
        assert knob.low <= start[setting] <= knob.high
        assert knob.low < knob.high
        for bound in (knob.low, knob.high):
            with_settings(preset, {setting: int(bound) if knob.whole else bound})
    assert ("ranker.list_epochs" in space) is not has_labels
    fixed = optuna.trial.FixedTrial(start)
    assert changes_of(fixed, space, start) == {}, "the start is the preset itself"


def test_the_preset_file_is_the_preset_that_was_found(tmp_path: Path):
    file = tmp_path / "first.toml"
    file.write_text('base = "tiny"\nthreads = 2\nrefit = false\n[ranker]\ntried_rows = [[1e-3, 0.2]]\n')
    begun = named_preset(str(file), ["encoders.epochs=3"])
    found = {**begun.changes, "encoders.learning_rate": 1.23e-05, "ranker.epochs": 4}
    (tmp_path / "tuned.toml").write_text(preset_text(begun.root, found))
    read = named_preset(str(tmp_path / "tuned.toml"))
    assert settings_of(read) == settings_of(with_settings(begun, found))
    assert read.encoders.learning_rate == 1.23e-05
    assert read.root == "tiny"


@pytest.mark.parametrize(
    ("only", "fixed", "message"),
    [
        (("ranke",), (), "--over ranke: is not searched; what is: encoders.dropout, "),
        (("sizes",), (), "--over sizes: is not searched"),
        (("encoders.dropout",), ("encoders.dropout",), "nothing is left to search"),
    ],
)
def test_what_cannot_be_searched_is_named(only, fixed, message):
    with pytest.raises(InvalidInput, match=message.replace(".", r"\.")):
        space_of(PRESETS["tiny"], has_labels=True, only=only, fixed=fixed)


def test_over_names_a_part_and_set_is_left_alone():
    space = space_of(PRESETS["tiny"], has_labels=False, only=("ranker",), fixed=("ranker.list_epochs",))
    assert {name.partition(".")[0] for name in space} == {"ranker"}
    assert "ranker.list_epochs" not in space
    assert "ranker.list_negatives" in space
