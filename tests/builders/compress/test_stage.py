"""`peregrine build --compress`: smaller engines behind the same answers, and a gate that stops the build
where users would lose."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_builder import built_ahead
from rich.console import Console

from builders.build import BuildOptions, build
from builders.compare.chain import ChainRow, compare_chain
from builders.compress.recipe import read_recipe
from builders.presets import preset
from ensemble.errors import InvalidInput
from ensemble.local import LocalPipeline
from ensemble.release.names import release_names
from ensemble.release.release import open_release
from ensemble.steps.served import open_served

# Every method once, cheaply; limits as wide as 600 users and thirty steps of training need.
RECIPE = """\
calibration_users = 64
[item_encoder.quantize]
onnxruntime = ["int8", "fp32"]
tensorrt = []
budget = {size = 0.6}
[user_encoder.prune]
method = "structured"
share = 0.5
round_to = 8
steps = 30
[ranker.distil]
student = {hidden = 16}
steps = 60
[ranker.quantize]
budget = {loss = 0.5}
qat = "never"
[gate]
ranking = 0.5
auc = 0.3
ece = 0.3
slices = 1.0
samples = 200
"""
SABOTAGE = """\
calibration_users = 64
[ranker.prune]
method = "magnitude"
share = 0.99
steps = 0
"""


def compressed(workshop: Path, text: str) -> str:
    path = workshop / "recipe.toml"
    path.write_text(text)
    options = BuildOptions(
        workshop / "shop",
        workshop / "repository",
        preset("tiny"),
        recipe=read_recipe(path),
        recipe_name=path.name,
        refit=False,
    )
    return build(options, Console(quiet=True))[0]


@pytest.fixture(scope="module")
def release(workshop: Path) -> str:
    return compressed(workshop, RECIPE)


def test_engines_are_smaller_and_the_report_says_by_how_much(workshop, release):
    told = open_release(workshop / "repository", release).manifest["report"]["compress"]
    sizes = {(size["model"], size["runtime"]): size for size in told["engines"]}
    for model in ("item_encoder", "user_encoder", "ranker"):
        engine = workshop / "repository" / f"{release}_{model}" / "1" / "model.onnx"
        before = workshop / "repository" / f"r1_{model}" / "1" / "model.onnx"
        assert engine.stat().st_size == sizes[model, "onnxruntime"]["bytes"]
        assert before.stat().st_size == sizes[model, "onnxruntime"]["reference_bytes"]
        assert engine.stat().st_size < before.stat().st_size
    assert (
        sizes["item_encoder", "onnxruntime"]["bytes"]
        <= 0.6 * sizes["item_encoder", "onnxruntime"]["reference_bytes"]
    )
    assert (
        sizes["user_encoder", "onnxruntime"]["parameters"]
        < sizes["user_encoder", "onnxruntime"]["reference_parameters"]
    )
    assert sizes["ranker", "tensorrt"]["bytes"] < 0.6 * sizes["ranker", "tensorrt"]["reference_bytes"]
    assert {node["runtime"] for node in told["nodes"] if node["model"] == "ranker"} == {
        "onnxruntime",
        "tensorrt",
    }
    assert {"uncompressed", "planner", "global", "distil", "prune"} <= {
        variant["family"] for variant in told["variants"]
    }
    served = [(v["model"], v["runtime"]) for v in told["variants"] if v["chosen"]]
    assert sorted(served) == sorted(set(served)), "one engine a model and runtime is served"
    assert told["gates"]["onnxruntime"]["ok"]
    assert told["gates"]["tensorrt"]["ok"]


def test_typed_onnx_for_tensorrt_lies_beside_the_engine_and_in_the_manifest(workshop, release):
    opened = open_release(workshop / "repository", release)
    opened.verify()
    assert f"{release}_ranker/1/model.tensorrt.onnx" in opened.manifest["files"]
    user_encoder = f"{release}_user_encoder/1/model.tensorrt.onnx"
    assert user_encoder not in opened.manifest["files"], "model.onnx is not quantized: plans are made of it"


def test_nvidias_builder_takes_every_engine(workshop, release, tmp_path):
    """The item encoder is 8 bits on the CPU, and left alone for TensorRT: so its plan is of another file."""
    assert set(built_ahead(workshop / "repository", release, tmp_path)) == {
        "item_encoder",
        "user_encoder",
        "ranker",
    }


def test_it_answers_like_any_release(workshop, release):
    answer = LocalPipeline(open_served(workshop / "repository", release)).recommend(["u1", "nobody"])
    assert (answer["item_ids"] != b"").all()
    assert answer["release"].ravel().tolist() == [release.encode()] * 2


def test_items_are_those_of_the_compressed_encoder(workshop, release):
    """A new item's row comes from the engine: it must lie in the space of the rows that are there."""
    rows, before = (open_release(workshop / "repository", name).items for name in (release, "r1"))
    assert (rows["embedding"][1:] != before["embedding"][1:]).any()
    cosine = (rows["embedding"][1:] * before["embedding"][1:]).sum(1) / (before["embedding"][1:] ** 2).sum(1)
    assert cosine.mean() > 0.95


def test_a_loss_beyond_the_limit_stops_the_build_with_the_table(workshop, release):
    there = release_names(workshop / "repository")
    with pytest.raises(InvalidInput, match="compression loses more than the gate allows") as caught:
        compressed(workshop, SABOTAGE)
    assert "| AUC ctr |" in str(caught.value)
    assert "cure:" in str(caught.value)
    assert release_names(workshop / "repository") == there


def test_more_calibration_users_than_there_are_is_refused(workshop, release):
    with pytest.raises(InvalidInput, match=r"calibration_users = 5000: this shop has \d+"):
        compressed(workshop, RECIPE.replace("calibration_users = 64", "calibration_users = 5000"))


def test_the_chain_is_compared_step_by_step(workshop, release):
    rows = compare_chain(
        workshop / "repository", "r1", release, batches=(1, 4), progress=lambda share, text: None
    )
    assert [row.batch for row in rows] == [1, 4]
    for row in rows:
        assert (
            list(row.before_ms)
            == list(row.after_ms)
            == ["features", "user_encoder", "recall", "ranker", "reranking"]
        )
        assert row.engines == ("user_encoder", "ranker")
        assert min(*row.before_ms.values(), *row.after_ms.values()) > 0


def test_amdahls_bound_changes_the_engines_alone():
    row = ChainRow(
        1,
        {"features": 3.0, "recall": 1.0, "ranker": 6.0},
        {"features": 2.0, "recall": 1.0, "ranker": 2.0},
        ("ranker",),
    )
    assert row.gain == pytest.approx(10 / 5)
    assert row.bound == pytest.approx(10 / 6)
