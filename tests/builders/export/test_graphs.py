"""Kept graphs: a module of a known shape is not traced again, and its model is its own."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn

from builders import keys
from builders.export import graphs, onnx_export
from ensemble.engines import open_engine
from ensemble.spec import ENGINE_STEP, Axis, ModelSpec, TensorSpec

WIDTH = 6


class Layers(nn.Module):
    """Two layers beside a number of their own, as the ranker's calibration is."""

    def __init__(self, seed: int, slope: float = 1.0, *, folds: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, 3))
        self.register_buffer("scale", torch.rand(3))
        self.slope, self.folds = slope, folds

    def forward(self, values):
        scale = torch.exp(self.scale) * 2 if self.folds else self.scale
        return self.slope * self.layers(values) * scale


B = Axis("B", "rows", None)
SPEC = ModelSpec(
    "layers",
    ENGINE_STEP,
    (TensorSpec("values", "float32", (B, Axis("F", "numbers", WIDTH)), "what is read"),),
    (TensorSpec("found", "float32", (B, Axis("T", "numbers", 3)), "what is found"),),
)
FEEDS = {"values": np.random.default_rng(0).standard_normal((8, WIDTH)).astype(np.float32)}


@pytest.fixture(autouse=True)
def traced(monkeypatch, tmp_path):
    """The modules that torch's exporter was asked for; the user's cache is a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(graphs, "_is_ours", lambda of: of is Layers)
    monkeypatch.setattr(keys, "code_digest", lambda package: package)
    trace, modules = onnx_export._trace, []

    def counted(module, *arguments):
        modules.append(module)
        trace(module, *arguments)

    monkeypatch.setattr(onnx_export, "_trace", counted)
    return modules


def export(module, folder):
    error = onnx_export.export_model(module, SPEC, folder / "model.onnx", FEEDS)
    assert error < 1e-5
    return (folder / "model.onnx").read_bytes()


def kept():
    return list(graphs.graphs_folder().iterdir())


def test_a_module_of_a_known_shape_is_given_the_kept_graph_and_its_own_weights(traced, tmp_path):
    first, second = (export(Layers(seed), tmp_path) for seed in (0, 1))
    assert len(traced) == 1
    assert first != second
    assert export(Layers(0), tmp_path) == first
    found = open_engine(tmp_path / "model.onnx").run(FEEDS)["found"]
    wanted = Layers(0)(torch.from_numpy(FEEDS["values"])).detach().numpy()
    assert np.allclose(found, wanted, atol=1e-6)


def test_the_graph_is_the_same_whoever_asked_first(traced, tmp_path):
    first = export(Layers(0), tmp_path)
    (path,) = kept()
    path.unlink()
    export(Layers(1), tmp_path)
    assert export(Layers(0), tmp_path) == first
    assert len(traced) == 2


def test_a_number_that_is_no_weight_makes_another_graph(traced, tmp_path):
    export(Layers(0, slope=1.0), tmp_path)
    export(Layers(0, slope=2.0), tmp_path)
    assert len(traced) == 2


def test_weights_that_the_graph_holds_as_other_numbers_are_exported_by_themselves(traced, tmp_path):
    module = Layers(0, folds=True)
    export(module, tmp_path)
    export(Layers(1, folds=True), tmp_path)
    assert traced[1] is module
    assert len(traced) == 3  # one to find out, which is remembered, and each module


def test_where_a_kept_graph_does_not_answer_as_torch_does_the_module_is_exported_by_itself(traced, tmp_path):
    export(Layers(0, slope=1.0), tmp_path)
    (ours,) = kept()
    export(Layers(0, slope=2.0), tmp_path)
    (other,) = set(kept()) - {ours}
    other.write_bytes(ours.read_bytes())
    module = Layers(1, slope=2.0)
    export(module, tmp_path)
    assert traced[-1] is module


def test_a_home_that_cannot_be_written_costs_time_only(traced, tmp_path):
    (tmp_path / "home").write_text("a file, where a folder should be")
    module = Layers(0)
    export(module, tmp_path)
    assert traced == [module]


def test_a_user_without_a_home_exports_as_before(traced, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is for an id without a name
    monkeypatch.chdir(tmp_path)
    module = Layers(0)
    export(module, tmp_path)
    assert traced == [module]
    assert not (tmp_path / "~").exists()


def test_what_a_killed_export_left_is_used_by_the_next_one(traced, monkeypatch, tmp_path):
    export(Layers(0), tmp_path)
    (path,) = kept()
    path.rename(path.with_suffix(".partial"))
    export(Layers(0), tmp_path)
    assert kept() == [path]


def test_a_killed_export_leaves_no_graph(traced, monkeypatch, tmp_path):
    whole = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(Layers(0), tmp_path)
    monkeypatch.setattr(torch.onnx, "export", whole)
    assert kept() == []
    export(Layers(0), tmp_path)
    assert len(kept()) == 1


def interrupted(*arguments, **options):
    raise KeyboardInterrupt


def test_the_graphs_that_nobody_asks_for_go_first(monkeypatch, tmp_path):
    export(Layers(0, slope=1.0), tmp_path)
    (first,) = kept()
    os.utime(first, (0, 0))
    monkeypatch.setattr(graphs, "_MOST_BYTES", int(1.5 * first.stat().st_size))
    export(Layers(0, slope=2.0), tmp_path)
    assert len(kept()) == 1
    assert not first.exists()


def test_code_of_others_is_exported_by_itself(traced, monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "_is_ours", lambda of: False)
    module = Layers(0)
    export(module, tmp_path)
    assert traced == [module]
    assert not graphs.graphs_folder().exists()
