"""Settings are changed by name, typed and checked; what is wrong is named before anything is built."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shops import ROOT

from builders.presets import preset
from builders.settings import named_preset, settings_of, with_settings
from ensemble.errors import InvalidInput


def test_a_setting_is_changed_and_remembered():
    done = named_preset(
        "tiny", ["encoders.epochs=4", "ranker.model.expert=[16, 8]", "refit=false", "threads=2"]
    )
    assert (done.encoders.epochs, done.ranker.model.expert, done.refit, done.threads) == (
        4,
        (16, 8),
        False,
        2,
    )
    assert done.encoders.learning_rate == preset("tiny").encoders.learning_rate
    assert done.changes == {
        "encoders.epochs": 4,
        "ranker.model.expert": (16, 8),
        "refit": False,
        "threads": 2,
    }
    assert named_preset("tiny") == preset("tiny")


WRONG = {
    "encoders.epoch=4": "--set encoders.epoch: no such setting; there are sizes.seen",
    "epochs=4": "--set epochs: no such setting; do you mean encoders.epochs, ranker.epochs",
    "encoders.epochs=four": "--set encoders.epochs=four: should be a valid integer",
    "encoders.epochs=1.5": "--set encoders.epochs=1.5: should be a valid integer",
    "encoders.epochs=0": "--set encoders.epochs=0: should be at least 1",
    "encoders.dropout=1": "--set encoders.dropout=1: should be a share, 0 to below 1",
    "ranker.rate_age=1.5": "--set ranker.rate_age=1.5: should be a share, 0 to below 1",
    "encoders.learning_rate=nan": "--set encoders.learning_rate=nan: should be a finite number",
    "encoders.dim=64": "--set encoders.dim: no such setting",
    "encoders.heads=5": "--set: encoders.heads does not divide sizes.embedding",
    "sizes.max_top_k=999": "--set: sizes.max_top_k is more than sizes.candidates",
    "encoders.epochs": "--set encoders.epochs: write NAME=VALUE",
}


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_change_is_named(change):
    with pytest.raises(InvalidInput) as caught:
        named_preset("tiny", [change])
    assert str(caught.value).startswith(WRONG[change])


def test_every_setting_listed_may_be_set_to_its_own_value():
    for name in ("tiny", "base", "quick"):
        settings = settings_of(preset(name))
        assert len(settings) > 50
        same = with_settings(preset(name), settings)
        assert settings_of(same) == settings


def test_a_preset_file_is_a_preset_of_its_own_name(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text('base = "tiny"\nthreads = 3\n[encoders]\nepochs = 2\n[ranker]\nmodel.dropout = 0.2\n')
    done = named_preset(str(file), ["encoders.epochs=5"])
    assert (done.name, done.threads, done.encoders.epochs, done.ranker.model.dropout) == ("mine", 3, 5, 0.2)
    for text, message in (
        ("[encoders]\nepochs = true\n", "mine.toml: encoders.epochs=True: "),
        ("[encoder]\nx = 1\n", "mine.toml: encoder.x: no such setting"),
        ('base = "huge"\n', "mine.toml: base = 'huge': unknown"),
        ("x =", "mine.toml is not TOML"),
    ):
        file.write_text(text)
        with pytest.raises(InvalidInput) as caught:
            named_preset(str(file))
        assert message in str(caught.value)
    with pytest.raises(InvalidInput, match=r"none\.toml: No such file"):
        named_preset(str(tmp_path / "none.toml"))


def test_settings_are_shown_without_a_build(tmp_path: Path):
    command = [sys.executable, "-m", "peregrine", "build", str(tmp_path), "--preset", "tiny"]
    command += ["--set", "encoders.epochs=3", "--show-settings", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout)["settings"]["encoders.epochs"] == 3
    assert list(tmp_path.iterdir()) == []
