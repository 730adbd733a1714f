"""The planner on tiny exported models with a judge that ranks what they score: sensitive blocks stay high,
the rest goes down."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from small_modules import exported
from torch import nn

from builders.compress.judge.judge import Judge, Judged
from builders.compress.quantize import planner
from builders.compress.quantize.calibration import calibrate
from builders.compress.quantize.planner import choose_precisions, global_8bit
from ensemble.engines.onnx import open_session
from ensemble.errors import InvalidInput

USERS, ITEMS, WIDTH = 160, 40, 64


class Outlier(nn.Module):
    """Three layers; in the first, one input of a thousandfold weight takes all the codes of its channel, and
    cancels out behind it.

    (What 8 bits cannot hold: the first layer's channels carry a large common part that the last one subtracts
    again.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.sensitive, self.wide, self.out = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 256),
            nn.Linear(256, 1),
        )
        self.last = nn.Linear(WIDTH, 1)
        with torch.no_grad():
            self.sensitive.weight[:, 0] = 300.0
            self.out.weight.mul_(0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, I, W], whose first column is the same for all items of a user -> scores [B, I]."""
        hidden = self.sensitive(x)
        hidden = hidden - hidden.mean(-1, keepdim=True)
        return (self.last(hidden) + self.out(torch.relu(self.wide(hidden)))).squeeze(-1)


@pytest.fixture(scope="module")
def model() -> bytes:
    torch.manual_seed(1)
    return exported(Outlier(), torch.randn(3, ITEMS, WIDTH))


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(USERS, ITEMS, WIDTH)).astype(np.float32)
    x[:, :, 0] = rng.normal(size=(USERS, 1))
    return {"x": x}


@pytest.fixture(scope="module")
def judge(model: bytes, feeds: dict[str, np.ndarray]) -> Judge:
    """Each user wants one of the items that the uncompressed model ranks high."""
    scores = open_session(model).run(None, feeds)[0]
    wanted = np.argsort(-scores, 1)[np.arange(USERS), np.random.default_rng(4).integers(0, 5, USERS)]

    def judged(candidate: bytes) -> Judged:
        top = np.argsort(-open_session(candidate, fuse=False).run(None, feeds)[0], 1, kind="stable")[:, :10]
        hit = top == wanted[:, None]
        return Judged(np.where(hit.any(1), 1 / np.log2(2 + hit.argmax(1)), 0.0), top + 1)

    return judged


def _chosen(model, feeds, judge, **more):
    return choose_precisions(model, feeds, judge, ranges=calibrate(model, feeds), **more)


def options(**changed):
    return {
        "runtime": "tensorrt",
        "candidates": ("int8", "fp16", "fp32"),
        "max_loss": 0.02,
        "min_overlap": 0.9,
        **changed,
    }


def test_sensitive_layer_stays_at_16_bits_and_the_rest_goes_to_8(model, feeds, judge):
    told = []
    found = _chosen(model, feeds, judge, **options(), progress=lambda share, text: told.append((share, text)))
    assert found.precisions["sensitive"] == "fp16"
    assert {found.precisions["wide"], found.precisions["out"]} == {"int8"}
    rows = {row["name"]: row for row in found.table}
    assert rows["sensitive"]["loss"]["overlap"] < 0.9 < rows["wide"]["loss"]["overlap"]
    assert rows["sensitive"]["reason"]
    assert rows["wide"]["reason"] == ""
    assert found.trial.loss.overlap >= 0.9
    assert found.trial.loss.relative <= 0.02
    assert told[-1][0] == 1.0
    assert "sensitive" in {text.split()[0] for _, text in told}


def test_planner_loses_less_than_global_8_bits_at_equal_size(model, feeds, judge):
    every = global_8bit(model, judge, calibrate(model, feeds), runtime="onnxruntime", feeds=feeds)
    found = _chosen(model, feeds, judge, runtime="onnxruntime", target_size=0.6)
    blind = global_8bit(
        model, judge, calibrate(model, feeds), runtime="onnxruntime", feeds=feeds, size=found.trial.size
    )
    assert every.loss.overlap < 0.9
    assert blind.size <= found.trial.size + 0.01
    assert found.trial.size <= 0.6
    assert found.trial.loss.overlap >= blind.loss.overlap


def test_same_inputs_same_precisions_and_bytes_and_it_is_data(model, feeds, judge):
    both = [_chosen(model, feeds, judge, **options()) for _ in range(2)]
    assert both[0].model == both[1].model
    assert json.dumps(both[0].to_json()) == json.dumps(both[1].to_json())
    assert all(trial.latency is None for trial in both[0].trials)  # no TensorRT here
    assert "model" not in both[0].to_json()


def test_on_rtx_cards_fp8_comes_first_and_int8_gains_bytes_only(model, feeds, judge):
    every = ("int8", "fp8", "fp16", "fp32")
    found = _chosen(model, feeds, judge, **options(flavor="rtx", candidates=every))
    assert {found.precisions["wide"], found.precisions["out"]} == {"fp8"}
    assert [note for note in found.notes if note.startswith("int8 saves bytes only: on RTX cards")]
    without = _chosen(model, feeds, judge, **options(flavor="rtx"))
    assert "fp8" not in without.precisions.values()
    tried = [row for row in without.table if row["tried"] == "int8"]
    assert tried
    assert all(row["flops_share"] == 0 for row in tried), "products are made in fp16"
    usual = _chosen(model, feeds, judge, **options(candidates=every))
    assert max(row["flops_share"] for row in usual.table if "flops_share" in row) > 0
    assert not [note for note in usual.notes if "RTX" in note]
    assert "int8" in usual.precisions.values(), "TensorRT multiplies int8, and it costs less here"


def test_products_that_tensor_cores_do_not_take_at_8_bits_save_bytes_only(model, feeds, judge):
    """`out` and `last` have one column; what TensorRT does with it in 8 bits is slower than 16."""
    rows = {row["name"]: row for row in _chosen(model, feeds, judge, **options()).table}
    assert {name for name, row in rows.items() if row["flops_share"] == 0} == {"out", "last"}
    on_cpu = _chosen(model, feeds, judge, runtime="onnxruntime", target_size=0.6)
    assert all(row["flops_share"] > 0 for row in on_cpu.table), "a CPU takes any width"


def test_pinned_blocks_are_left_alone(model, feeds, judge):
    found = _chosen(model, feeds, judge, **options(pinned={"wide": "fp32"}))
    assert found.precisions["wide"] == "fp32"
    assert next(row for row in found.table if row["name"] == "wide")["reason"] == "pinned"


def test_budgets_that_cannot_be_met_say_the_best_reached(model, feeds, judge):
    with pytest.raises(InvalidInput, match=r"target_size 1.0% of fp32 cannot be met .* the smallest is \d"):
        _chosen(model, feeds, judge, runtime="onnxruntime", target_size=0.01)
    with pytest.raises(
        InvalidInput, match=r"target_latency 0.1% of fp32 cannot be met .* the fastest takes \d"
    ):
        _chosen(model, feeds, judge, runtime="onnxruntime", target_latency=0.001)
    with pytest.raises(InvalidInput, match=r"max_loss .* cannot be met .* unpin sensitive"):
        _chosen(
            model, feeds, judge, **options(max_loss=0.0001, min_overlap=0.999, pinned={"sensitive": "int8"})
        )


def test_wrong_options_are_refused(model, feeds, judge):
    with pytest.raises(InvalidInput, match="one budget"):
        _chosen(model, feeds, judge, runtime="onnxruntime")
    with pytest.raises(InvalidInput, match="one budget"):
        _chosen(model, feeds, judge, **options(target_size=0.5))
    with pytest.raises(InvalidInput, match="cannot be measured for tensorrt"):
        _chosen(model, feeds, judge, runtime="tensorrt", target_latency=0.5)
    with pytest.raises(InvalidInput, match="candidates has fp16"):
        _chosen(model, feeds, judge, runtime="onnxruntime", candidates=("fp16",), max_loss=0.01)
    with pytest.raises(InvalidInput, match="no block tower"):
        _chosen(model, feeds, judge, **options(pinned={"tower": "int8"}))
    with pytest.raises(InvalidInput, match="needs 128 users, 20 are given"):
        calibrate(model, {"x": feeds["x"][:20]})


def test_an_engine_slower_than_fp32_is_not_chosen(model, feeds, judge, monkeypatch):
    """The measured time decides; here it is told, since which one is slower depends on the machine."""
    monkeypatch.setattr(planner, "time_share", lambda *_, **__: (1.2, 0.0))
    found = _chosen(model, feeds, judge, runtime="onnxruntime", max_loss=0.05, min_overlap=0.5)
    assert set(found.precisions.values()) == {"fp32"}
    assert any("slower on onnxruntime" in note for note in found.notes)


def test_a_judge_whom_nobody_pleases_is_refused(model, feeds):
    with pytest.raises(InvalidInput, match="judge on more held-out users"):
        _chosen(model, feeds, lambda _: Judged(np.zeros(5), np.ones((5, 10), np.int64)), **options())
