"""`peregrine report`: one page that needs nothing else, with and without compression; figures that have what
they promise."""

from __future__ import annotations

import copy
import html
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from builders.compress.judge.gate import verdict
from builders.compress.judge.judge import Loss
from builders.compress.judge.measure import Measured, Timing
from builders.compress.quantize.engine import nodes_of, uncompressed, variant_of, variants_of
from builders.compress.quantize.planner import ChosenPrecisions, Trial
from builders.report import figures as figures
from builders.report.html import page, release_figures, write_figures

PNG = b"\x89PNG\r\n\x1a\n"


def _trial(label, size, latency, loss, low=()):
    precisions = {name: "int8" if name in low else "fp32" for name in ("first", "second", "third")}
    return Trial(label, precisions, size, latency, Loss(loss, 0.0001, 1 - loss))


def _chosen_precisions():
    chosen = _trial("planner", 0.5, 0.6, 0.001, ("first",))
    tried = [_trial("2 of 3 low", 0.4, 0.5, 0.01, ("first", "third")), chosen]
    measured = {"op": "MatMul", "parameters": 640}
    table = [
        {
            "name": "first",
            **measured,
            "loss": {"overlap": 0.999, "relative": 0.0001},
            "chosen": "int8",
            "reason": "",
        },
        {
            "name": "<second>",
            **measured,
            "loss": {"overlap": 0.93, "relative": 0.004},
            "chosen": "fp32",
            "reason": "lifted",
        },
        {"name": "third", **measured, "chosen": "fp32", "reason": "cannot be lower"},
    ]
    return ChosenPrecisions("onnxruntime", chosen.precisions, table, chosen, tried, {8: 0.6}, [], b"")


def _engine():
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((64, 10), np.float32), "weight")
    inputs, outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", width])
        for name, width in (("x", 64), ("y", 10))
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])], "g", [inputs], [outputs], [weight]
    )
    return onnx.helper.make_model(graph).SerializeToString()


def _variants():
    plain = _trial("global int8", 0.3, 0.4, 0.02, ("first", "second"))
    points = [
        uncompressed("ranker", "onnxruntime", _engine(), 14.0),
        variant_of("ranker", "onnxruntime", plain, _engine(), 14.0, "global"),
    ]
    return [*points, *variants_of("ranker", _chosen_precisions(), _engine(), 14.0)]


def _compress():
    rng = np.random.default_rng(0)
    ranks = rng.integers(0, 30, 500).astype(float)
    one = Measured(np.arange(500), ranks, np.ones(500), rng.integers(1, 90, (500, 10)), {}, num_candidates=64)
    other = Measured(
        **{
            **vars(one),
            "ranks": ranks + 4,
            "timings": (Timing("ranker", 1, 2.0, 1.0), Timing("ranker", 8, 5.0, 11.0)),
        }
    )
    engine = {"model": "ranker", "runtime": "onnxruntime", "bytes": 500_000, "reference_bytes": 1_410_000}
    return {
        "plan": {"gate": {"ranking": 0.01}},
        "plan_name": "balanced",
        "engines": [{**engine, "parameters": 640, "reference_parameters": 1280}],
        "variants": _variants(),
        "nodes": nodes_of("ranker", _chosen_precisions()),
        "gates": {"onnxruntime": verdict(one, other).to_json()},
        "notes": ["ranker at batch 1: int8 was slower, fp32 is kept & served"],
    }


@pytest.fixture
def manifest(tiny_release):
    return copy.deepcopy(tiny_release.manifest)


@pytest.fixture
def compressed(manifest):
    manifest["report"]["compress"] = json.loads(json.dumps(_compress(), allow_nan=False))
    manifest["report"]["recall"]["tried"] = [{"index": "IVF64,Flat", "nprobe": 4, "recall_at_100": 0.981}]
    return manifest


def test_a_release_without_compression_says_so_and_shows_its_ranking(manifest):
    found = release_figures(manifest["report"])
    text = page(manifest, found)
    assert list(found) == ["worth", "ranking", "learning", "calibration"]
    assert "not compressed" in text
    chain = manifest["report"]["ranking"]["ways"]["chain"]["ndcg@10"]
    assert f"<td>{chain:.4f}</td>" in text
    assert all(task in text for task in manifest["report"]["tasks"])
    opening = text[text.index("</h1>") : text.index("<h2>")]
    assert all(f"<h2>{part}</h2>" in text for part in ("What the lists show", "What it was made of"))
    assert "A list of 10 that this release shows is worth " in opening
    assert f"<td>{manifest['report']['worth']['ways']['best']['worth']:.4f}</td>" in text


def test_a_page_says_all_that_the_release_knows_of_itself(manifest):
    """What is below simple ways, each figure's interval, each source, each group of users, and how it was
    built."""
    manifest |= {"stages_s": {"data": 1.25, "ranker": 10.0}, "settings": {"encoders.epochs": 3}}
    manifest["training"] = {"encoders.epochs": 3, "ranker.bf16": True}
    report = manifest["report"]
    text = page(manifest, {})
    assert all(html.escape(f"{line}.") in text for line in report["shortfalls"])
    of = report["newcomers"]["users"]["1 to 5"]
    low, high = of["intervals"]["worth"].values()
    assert f"<td>{of['worth']:.4f} [{low:.4f}, {high:.4f}]</td>" in text[text.index("events of the user") :]
    way = report["baselines"]["ranking"]["ndcg@10"]["ways"]["chain"]
    assert f"{way['value']:.4f} [{way['low']:.4f}, {way['high']:.4f}]" in text
    minus = report["worth"]["chain_minus"]["popularity"]
    assert f"<td>{minus['mean']:+.4f} [{minus['low']:+.4f}, {minus['high']:+.4f}]</td>" in text
    assert "<h2>What each source of recall adds</h2>" in text
    assert "{'" not in html.unescape(text), "nothing is shown as Python writes it"
    assert "The slowest stage was ranker: 10.0 of 11.2 s." in text
    assert "<td>encoders.epochs</td><td>3</td><td>changed</td>" in text
    assert "<td>ranker.bf16</td><td>True</td><td></td>" in text


def test_a_build_keeps_its_settings_and_what_its_stages_took(manifest):
    assert {"data", "encoders", "ranker", "verify"} <= set(manifest["stages_s"])
    assert manifest["training"]["encoders.epochs"] > 0


def test_a_release_keeps_what_each_epoch_had_and_marks_the_kept_one(manifest):
    """The kept epoch is the best validated one, and the picture is drawn from what is kept."""
    for model, better in (("encoders", max), ("ranker", min)):
        of = manifest["report"][model]
        judged = {one["epoch"]: one["validation"] for one in of["curve"] if "validation" in one}
        assert of["kept_epoch"] == better(judged, key=judged.get)
        assert [one["epoch"] for one in of["curve"] if "loss" in one] == list(range(1, of["epochs"] + 1))
    text = page(manifest, release_figures(manifest["report"]))
    assert "encoders: epoch " in text[text.index("<h2>Learning curves</h2>") :]

    def draw():
        figure = figures.learning({name: manifest["report"][name] for name in ("encoders", "ranker")})
        kept = [axes.lines[-1].get_xdata()[0] for axes in figure.axes]
        assert sorted(kept) == sorted(
            manifest["report"][name]["kept_epoch"] for name in ("encoders", "ranker") * 2
        )
        return figure

    assert figures.png(draw).startswith(PNG)


def test_first_clicks_are_shown_where_there_are_new_users(manifest):
    manifest["report"].pop("first_clicks", None)
    assert "First clicks" not in page(manifest, {})
    gain = {"mean": 0.1, "low": -0.02, "high": 0.2, "p_worse": 0.1}
    figures_of = {"users": 40, "chain": 0.15, "recall": 0.125, "popularity": 0.05}
    manifest["report"]["first_clicks"] = {"3": {**figures_of, "chain_minus_popularity": gain}}
    text = page(manifest, {})
    assert "<td>3</td><td>40</td><td>0.1500</td>" in text
    assert "+0.1000 [-0.0200, +0.2000]" in text


def test_an_older_release_without_curves_has_a_page(manifest):
    del manifest["report"]["encoders"], manifest["report"]["ranker"]["curve"]
    found = release_figures(manifest["report"])
    assert "learning" not in found
    assert "Learning curves" not in page(manifest, found)


def test_a_release_with_a_search_says_what_it_finds(pictured_release, manifest):
    assert "<h2>Search</h2>" not in page(manifest, {})
    found = pictured_release.manifest["report"]["search"]
    text, written = page(pictured_release.manifest, {}), (pictured_release.path / "report.md").read_text()
    assert f"<td>{found['with_taste']['ndcg@10']:.4f}</td>" in text
    for shown in ("words alone (BM25)", f"{found['queries']:,} queries"):
        assert shown in text
        assert shown in written


def test_the_page_is_whole_and_links_to_nothing(compressed):
    text = page(compressed, release_figures(compressed["report"]))
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', text)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert text.count("<img ") == len(release_figures(compressed["report"]))
    for tag in ("table", "div", "tr", "h2", "h3", "details"):
        assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"</{tag}>")


def test_a_compressed_release_shows_gate_pareto_precisions_and_latency(compressed):
    found = release_figures(compressed["report"])
    assert list(found) == [
        "worth",
        "ranking",
        "learning",
        "calibration",
        "pareto_ranker_onnxruntime",
        "precision_ranker_onnxruntime",
        "gate_onnxruntime",
        "latency_onnxruntime",
    ]
    text = page(compressed, found)
    for shown in (
        "2.8× smaller",
        "parameters -50%",
        "onnxruntime: failed",
        "global int8",
        "&lt;second&gt;",
        "kept &amp; served",
        "IVF64,Flat",
        "0.981",
    ):
        assert shown in text, shown
    assert '<tr class="FAIL"><td>NDCG@10</td>' in text


def test_the_planners_result_becomes_points_and_nodes():
    variants, nodes = _variants(), nodes_of("ranker", _chosen_precisions())
    size = len(_engine())
    assert [(v["name"], v["family"], v["bytes"], v["chosen"]) for v in variants] == [
        ("fp32", "uncompressed", size, False),
        ("global int8", "global", round(0.3 * size), False),
        ("2 of 3 low", "planner", round(0.4 * size), False),
        ("planner", "planner", round(0.5 * size), True),
    ]
    assert variants[1]["latency_ms"] == pytest.approx(5.6)
    assert variants[0]["parameters"] == 640
    assert [(n["node"], n["precision"], n["changed"] and round(n["changed"], 6)) for n in nodes] == [
        ("first", "int8", 0.001),
        ("<second>", "fp32", 0.07),
        ("third", "fp32", None),
    ]


def test_the_front_is_what_nothing_beats():
    assert figures.front([1.0, 2.0, 3.0, 3.0, 0.5], [3.0, 1.0, 2.0, 0.5, 4.0]) == [4, 0, 1, 3]


@pytest.mark.parametrize("timed", [True, False])
def test_names_of_crowded_points_do_not_cover_each_other(timed):
    """Five variants at nearly one place: those whose name has no room go without."""
    rows = [
        {
            "name": f"variant {i}",
            "family": "planner",
            "loss": 0.002 + i / 1e5,
            "bytes": 500_000 + i,
            "latency_ms": 5.0,
            "chosen": i == 2,
        }
        for i in range(5)
    ]
    rows.append(
        {
            "name": "fp32",
            "family": "uncompressed",
            "loss": 0.0,
            "bytes": 10**6,
            "latency_ms": 9.0,
            "chosen": False,
        }
    )
    rows = rows if timed else [{**row, "latency_ms": None} for row in rows]
    panels: list[list] = []

    def draw():
        figure = figures.pareto(rows, 0.005)
        figure.draw_without_rendering()
        for axes in figure.axes:
            panels.append([text for text in axes.texts if "variant" in text.get_text()])
            boxes = [text.get_window_extent() for text in panels[-1]]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        return figure

    assert figures.png(draw).startswith(PNG)
    assert len(panels) == (2 if timed else 1)
    assert all(any("(chosen)" in text.get_text() for text in texts) for texts in panels)


def test_figures_are_pictures_with_something_on_them(compressed, tmp_path):
    for path in write_figures(release_figures(compressed["report"]), tmp_path / "png"):
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def _run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "peregrine", "report", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_writes_the_active_release(tiny_repository, tmp_path):
    from shops import ROOT

    done = _run("-r", tiny_repository, "--out", tmp_path / "page.html", "--png", tmp_path / "png", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "png" / "ranking.png").read_bytes().startswith(PNG)
    sentence, *groups, files = done.stdout.splitlines()
    assert sentence.startswith("A list of 10 that this release shows is worth ")
    assert [line.split()[:2] for line in groups[1:3]] == [["0", "0"], ["1", "to"]]
    assert len(groups) == 10
    assert files == f"{tmp_path}/page.html and 4 PNG in {tmp_path}/png"


def test_what_is_not_there_is_one_line(tiny_repository, tmp_path):
    from shops import ROOT

    for arguments, message in (
        (("-r", tmp_path), "no release is active in"),
        (("-r", tiny_repository, "--release", "r9"), "no release 'r9' in"),
        (("-r", tiny_repository, "--out", tmp_path), "cannot write"),
    ):
        done = _run(*arguments, cwd=ROOT)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
