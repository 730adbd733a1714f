"""The second half of a build: it goes on from the verified model, and is published only if it is sane."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from rich.console import Console

import builders.encoders.stage
import builders.verify.refit
from builders.build import BuildOptions, build
from builders.compress.recipe import Gate, read_recipe
from builders.data.dataset import open_dataset, training_histories
from builders.encoders.encoders import EncoderConfig
from builders.encoders.sequences import Sequences
from builders.encoders.training import Start, train_encoders
from builders.export.reweight import reweighted
from builders.export.trained import open_trained
from builders.index.stage import _require_recall
from builders.presets import preset
from builders.report.html import page
from builders.weights import require_finite
from clients.operations.listing import list_releases
from ensemble.engines import open_engine
from ensemble.errors import InvalidInput
from ensemble.release.held_out import HELD_OUT, read_held_out
from ensemble.release.release import open_release


@pytest.fixture(scope="module")
def stages(release_cache) -> dict[str, Path]:
    """The folders of the finished stages of the release tiny, by name; read them only."""
    root = release_cache.folder("tiny") / "repository" / ".build" / "shop"
    return {path.name.rpartition("-")[0]: path for path in root.glob("*-*") if path.is_dir()}


@pytest.fixture
def warm(release_cache, tmp_path) -> tuple[Path, Path]:
    """(shop, repository) of a finished build, its stages with it, to be changed."""
    source = release_cache.folder("tiny")
    ignored = shutil.ignore_patterns(".lock", ".server.json", "refit_verify-*")
    shutil.copytree(source / "repository", tmp_path / "repository", ignore=ignored)
    shutil.copytree(source / "shop", tmp_path / "shop")
    return tmp_path / "shop", tmp_path / "repository"


def built(warm: tuple[Path, Path], **options) -> tuple[dict, str, list[str]]:
    """Builds again -> (manifest, what was said, the stages that ran)."""
    said = io.StringIO()
    console = Console(file=said, width=1000)
    name, done = build(BuildOptions(*warm, preset("tiny"), **options), console)
    manifest = json.loads((warm[1] / name / "manifest.json").read_text())
    return manifest, said.getvalue(), [stage.name for stage in done.done if not stage.skipped]


# --- what is published


def test_the_published_models_have_learned_from_the_newest_event(tiny_repository, stages):
    manifest = open_release(tiny_repository, "r1").manifest
    verified, known = open_dataset(stages["data"]), open_dataset(stages["refit_data"])
    encoders, ranker = manifest["trained"]["encoders"], manifest["trained"]["ranker"]
    assert manifest["refit"] is True
    assert "why_no_refit" not in manifest
    assert encoders["events"] == len(known.histories.item_rows) > len(training_histories(verified)[1])
    assert encoders["until"] == known.histories.times.max()
    assert ranker["events"] == 20_000
    assert ranker["until"] == known.train_impressions.times.max()
    [info] = list_releases(tiny_repository)
    assert info.trained_up_to == encoders["trained_up_to"]
    assert encoders["trained_up_to"] in (tiny_repository / "r1" / "report.md").read_text()
    trained, held_out = (set(training_histories(one)[1].tolist()) for one in (verified, known))
    assert manifest["report"]["refit"]["new_items"]["items"] == len(held_out - trained) > 0
    served = page(manifest, {})
    assert encoders["trained_up_to"] in served
    assert "refitted, served" in served


def test_calibration_and_the_weights_of_the_blend_are_the_verified_ones(stages):
    before, after = ({**np.load(stages[f"{which}ranker"] / "ranker.npz")} for which in ("", "refit_"))
    for name in ("calibration_scale", "calibration_bias", "score_mean", "score_scale", "deep_gate"):
        assert (before[name] == after[name]).all(), name
    assert any((before[name] != after[name]).any() for name in before), "it has learned"
    weights = [
        json.loads((stages[f"{which}index"] / "recall.json").read_text())["source_weights"]
        for which in ("", "refit_")
    ]
    assert weights[0] == weights[1]


def test_the_index_transitions_and_popularity_are_made_anew(stages):
    for name in ("popular.npy", "transitions.npy", "index.faiss"):
        assert (stages["index"] / name).read_bytes() != (stages["refit_index"] / name).read_bytes(), name
    known = open_dataset(stages["refit_data"])
    counts = np.bincount(known.histories.item_rows, minlength=known.num_items + 1)
    assert np.allclose(np.load(stages["refit_index"] / "popular.npy")[1:], np.log1p(counts[1:]))


def test_the_served_engines_are_the_refitted_modules(tiny_repository, stages):
    names = ("data", "encoders", "ranker")
    modules = open_trained({name: stages[f"refit_{name}"] for name in names}).modules
    release = open_release(tiny_repository, "r1")
    for name, module in modules.items():
        served, feeds = release.member_file(name, "model.onnx"), feeds_of(release.model(name))
        assert far_from(module, served, feeds) < 1e-4, name
        first = stages["export"] / "engines" / name / "model.onnx"
        assert far_from(module, first, feeds) > 1e-4, f"{name} has learned"


def test_what_each_held_out_user_s_list_was_worth_is_in_the_release(tiny_repository, stages):
    release = open_release(tiny_repository, "r1")
    assert f"r1/{HELD_OUT}" in release.manifest["files"]
    rows = read_held_out(release.path / HELD_OUT)
    dataset, report = open_dataset(stages["data"]), release.manifest["report"]
    targets = dataset.test
    assert rows["user"].tolist() == dataset.user_ids[targets.user_rows - 1].tolist()
    assert rows["item"].tolist() == dataset.item_ids[targets.item_rows - 1].tolist()
    assert (rows["time"] == dataset.histories.times[targets.history_ends]).all()
    assert rows["gain"].mean() == pytest.approx(report["ranking"]["ways"]["chain"]["ndcg@10"], rel=1e-5)
    worth = report["worth"]["ways"]["chain"]["worth"]
    assert rows["worth"].mean() == pytest.approx(worth, rel=1e-5)
    assert report["held_out"] == {"figure": "worth", "rows": len(rows), "split": "time"}


# --- what is not


def test_without_a_refit_the_verified_model_is_published(warm, stages):
    manifest, said, ran = built(warm, refit=False)
    assert (manifest["refit"], manifest["why_no_refit"]) == (False, "--no-refit")
    assert "the verified model is published, not a refit of it: --no-refit" in said
    assert ran == ["repository"]
    assert manifest["trained"]["encoders"]["events"] == len(
        training_histories(open_dataset(stages["data"]))[1]
    )
    name = manifest["release"]
    served = warm[1] / f"{name}_ranker" / "1" / "model.onnx"
    assert served.read_bytes() == (stages["export"] / "engines" / "ranker" / "model.onnx").read_bytes()


RECIPE = """\
calibration_users = 16
[ranker.prune]
method = "magnitude"
share = 0.1
steps = 0
[gate]
ranking = 0.5
slices = 1.0
"""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_recipe_is_applied_again_and_held_against_the_refitted_engines(warm, tmp_path):
    (tmp_path / "light.toml").write_text(RECIPE)
    recipe = {"recipe": read_recipe(tmp_path / "light.toml"), "recipe_name": "light.toml"}
    manifest, _, ran = built(warm, **recipe)
    assert ran == ["compress", "verify", "refit_compress", "refit_verify", "repository"]
    assert manifest["refit"] is True
    stages = {
        path.name.rpartition("-")[0]: path for path in (warm[1] / ".build" / "shop").glob("*compress-*")
    }
    told = json.loads((stages["refit_compress"] / "compress.json").read_text())
    assert manifest["report"]["compress"] == told
    assert told["gates"]["onnxruntime"]["ok"]
    served = (warm[1] / f"{manifest['release']}_ranker" / "1" / "model.onnx").read_bytes()
    engines = [stages[name] / "engines" / "ranker" / "model.onnx" for name in ("compress", "refit_compress")]
    assert [engine.read_bytes() == served for engine in engines] == [False, True]
    assert built(warm, **recipe)[2] == ["repository"], "an unchanged refit is skipped"


def test_a_refit_that_is_worse_on_held_out_rows_is_not_published(warm, monkeypatch):
    """Any change is too much for limits below 0."""
    monkeypatch.setattr(
        builders.verify.refit, "_LIMITS", SimpleNamespace(**{**Gate().model_dump(), "auc": -1.0})
    )
    manifest, said, ran = built(warm)
    assert manifest["refit"] is False
    assert "AUC ctr" in manifest["why_no_refit"]
    assert "the verified model is published, not a refit of it: it is worse on the held-out rows" in said
    assert ran == ["repository"]
    assert not list((warm[1] / ".build" / "shop").glob("refit_verify-*")), "the next build asks again"
    assert built(warm)[0]["refit"] is False
    monkeypatch.undo()
    assert built(warm)[0]["refit"] is True


def test_weights_that_are_not_finite_are_not_published(warm, monkeypatch):
    train = builders.encoders.stage.train_encoders

    def spoiled(*arguments, **options):
        checkpoint = train(*arguments, **options)
        checkpoint.item_ids[5, 3] = np.nan
        return checkpoint

    for path in (warm[1] / ".build" / "shop").glob("refit_encoders-*"):
        shutil.rmtree(path)
    monkeypatch.setattr(builders.encoders.stage, "train_encoders", spoiled)
    manifest, _, ran = built(warm)
    assert manifest["refit"] is False
    assert "encoders: training ended with ids not finite" in manifest["why_no_refit"]
    assert ran == ["repository"]


def test_not_finite_weights_are_named():
    require_finite("ranker", {"a": torch.ones(2), "b": np.ones(3)})
    with pytest.raises(InvalidInput, match="ranker: training ended with b not finite"):
        require_finite("ranker", {"a": torch.ones(2), "b": torch.tensor([1.0, np.inf])})


@pytest.mark.parametrize(
    ("before", "after", "is_fine"), [(0.99, 0.98, True), (0.99, 0.96, False), (0.9, 0.895, True)]
)
def test_an_index_that_finds_less_than_the_verified_one_is_refused(before, after, is_fine):
    """0.98 is wanted; what the verified one did not reach, the refit's need not reach either."""
    tried = [[{"recall_at_100": 0.5}, {"recall_at_100": value}] for value in (after, before)]
    if is_fine:
        _require_recall(*tried)
        return
    with pytest.raises(
        InvalidInput, match=f"recall_at_100 {after:.3f} at best; the verified one {before:.3f}"
    ):
        _require_recall(*tried)


# --- new items


def test_an_item_whose_first_event_was_held_out_gets_a_row_of_its_own(rng):
    config = EncoderConfig.tiny(epochs=1, dim=8, num_item_codes=1, num_user_codes=1)
    features = (np.zeros((31, 1), np.int32), np.zeros((31, 1), np.float32))
    features += (np.zeros((40, 1), np.int32), np.zeros((40, 1), np.float32))
    offsets = np.arange(41) * 6

    def trained(most: int, start: Start | None = None):
        items = rng.integers(1, most + 1, 240)
        return train_encoders(Sequences(offsets, items), *features, config=config, start=start)

    verified = trained(20)
    assert (verified.item_ids[21:] == 0).all(), "as an item that nobody knows"
    refitted = trained(25, Start(verified, 0.75))
    assert (refitted.item_ids[21:26] != 0).any(1).all()
    assert (refitted.item_ids[26:] == 0).all()
    moved = np.abs(refitted.item_ids[1:21] - verified.item_ids[1:21]).mean()
    assert 0 < moved < np.abs(verified.item_ids[1:21]).mean(), "it went on, and did not begin anew"


# --- weights put into an exported model


def feeds_of(model) -> dict[str, np.ndarray]:
    """Random inputs for three users."""
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in model.inputs:
        shape = (3, *(dim or 4 for dim in spec.dims))
        numbers = rng.normal(0, 1, shape).astype(spec.dtype) if spec.dtype == "float32" else np.ones(shape)
        feeds[spec.name] = numbers.astype(spec.dtype)
    return feeds


def far_from(module: torch.nn.Module, path: Path, feeds: dict[str, np.ndarray]) -> float:
    """The largest difference between an exported engine and a module, relative to the largest output."""
    with torch.no_grad():
        wanted = module.eval()(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    found = open_engine(path).run(feeds).values()
    return max(
        float(np.abs(one - two.numpy()).max() / np.abs(two.numpy()).max())
        for one, two in zip(found, wanted, strict=True)
    )


def test_any_weights_of_a_module_can_be_put_into_its_export(stages, tiny_repository, tmp_path):
    release = open_release(tiny_repository, "r1")
    for name, module in open_trained(stages).modules.items():
        before = {key: value.numpy().copy() for key, value in module.state_dict().items()}
        with torch.no_grad():
            for place, weight in enumerate(module.parameters()):
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(place))
        after = {key: value.numpy() for key, value in module.state_dict().items()}
        exported = stages["export"] / "engines" / name / "model.onnx"
        data = reweighted(exported.read_bytes(), before, after)
        assert data is not None, name
        (tmp_path / "model.onnx").write_bytes(data)
        feeds = feeds_of(release.model(name))
        assert far_from(module, tmp_path / "model.onnx", feeds) < 1e-4, name
        assert far_from(module, exported, feeds) > 1e-3, name


def model_with(**tensors: np.ndarray) -> bytes:
    """An ONNX model of initializers only."""
    graph = onnx.helper.make_graph(
        [], "g", [], [], [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    )
    return onnx.helper.make_model(graph).SerializeToString()


ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    ("tensors", "before"),
    [
        ({"val_1": ROWS + 9}, ROWS),
        ({"val_1": ROWS.T, "val_2": ROWS.T}, ROWS),
        ({"weight": ROWS + 9}, ROWS),
        ({"val_1": np.zeros(4, np.float32)}, np.zeros((2, 3), np.float32)),
        ({"val_1": np.zeros((2, 3), np.float32)}, np.zeros((2, 3), np.float32)),
    ],
    ids=[
        "nowhere",
        "in two places",
        "changed under its name",
        "equal numbers that differ later",
        "all equal",
    ],
)
def test_a_weight_whose_place_is_not_certain_is_exported_again(tensors, before):
    assert reweighted(model_with(**tensors), {"weight": before}, {"weight": ROWS + 1}) is None


def test_a_bias_by_age_is_found_turned_around_also_where_its_last_numbers_were_equal():
    """Short pasts have left them as they were; longer ones, in the refit, have not."""
    before, after = np.array([0, -1, -5, -5, -5], np.float32), np.array([1, -2, -4, -6, -5], np.float32)
    data = reweighted(model_with(index=before[None, ::-1]), {"bias": before}, {"bias": after})
    [tensor] = onnx.load_from_string(data).graph.initializer
    assert numpy_helper.to_array(tensor).tolist() == [after[::-1].tolist()]


@pytest.mark.parametrize(
    ("name", "layout"),
    [("weight", lambda w: w), ("val_1", lambda w: w.T), ("val_1", lambda w: w[1, [2, 0, 0, 1]])],
    ids=["under its name", "transposed", "laid out anew"],
)
def test_a_weight_is_found(name, layout):
    data = reweighted(model_with(**{name: layout(ROWS)}), {"weight": ROWS}, {"weight": ROWS * 7 + 1})
    [tensor] = onnx.load_from_string(data).graph.initializer
    assert (numpy_helper.to_array(tensor) == layout(ROWS * 7 + 1)).all()
