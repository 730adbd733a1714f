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
from builders.compress.quantize.planner import global_8bit, plan_precisions
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
    plan = plan_precisions(
        model, feeds, judge, **options(), progress=lambda share, text: told.append((share, text))
    )
    assert plan.precisions["sensitive"] == "fp16"
    assert {plan.precisions["wide"], plan.precisions["out"]} == {"int8"}
    rows = {row["name"]: row for row in plan.table}
    assert rows["sensitive"]["loss"]["overlap"] < 0.9 < rows["wide"]["loss"]["overlap"]
    assert rows["sensitive"]["reason"]
    assert rows["wide"]["reason"] == ""
    assert plan.chosen.loss.overlap >= 0.9
    assert plan.chosen.loss.relative <= 0.02
    assert told[-1][0] == 1.0
    assert "sensitive" in {text.split()[0] for _, text in told}


def test_planner_loses_less_than_global_8_bits_at_equal_size(model, feeds, judge):
    every = global_8bit(model, judge, calibrate(model, feeds), runtime="onnxruntime", feeds=feeds)
    plan = plan_precisions(model, feeds, judge, runtime="onnxruntime", target_size=0.6)
    blind = global_8bit(
        model, judge, calibrate(model, feeds), runtime="onnxruntime", feeds=feeds, size=plan.chosen.size
    )
    assert every.loss.overlap < 0.9
    assert blind.size <= plan.chosen.size + 0.01
    assert plan.chosen.size <= 0.6
    assert plan.chosen.loss.overlap >= blind.loss.overlap


def test_same_inputs_same_plan_and_bytes_and_it_is_data(model, feeds, judge):
    plans = [plan_precisions(model, feeds, judge, **options()) for _ in range(2)]
    assert plans[0].model == plans[1].model
    assert json.dumps(plans[0].to_json()) == json.dumps(plans[1].to_json())
    assert all(variant.latency is None for variant in plans[0].variants)  # no TensorRT here
    assert "model" not in plans[0].to_json()


def test_pinned_blocks_are_left_alone(model, feeds, judge):
    plan = plan_precisions(model, feeds, judge, **options(pinned={"wide": "fp32"}))
    assert plan.precisions["wide"] == "fp32"
    assert next(row for row in plan.table if row["name"] == "wide")["reason"] == "pinned"


def test_budgets_that_cannot_be_met_say_the_best_reached(model, feeds, judge):
    with pytest.raises(InvalidInput, match=r"target_size 1.0% of fp32 cannot be met .* the smallest is \d"):
        plan_precisions(model, feeds, judge, runtime="onnxruntime", target_size=0.01)
    with pytest.raises(
        InvalidInput, match=r"target_latency 0.1% of fp32 cannot be met .* the fastest takes \d"
    ):
        plan_precisions(model, feeds, judge, runtime="onnxruntime", target_latency=0.001)
    with pytest.raises(InvalidInput, match=r"max_loss .* cannot be met .* unpin sensitive"):
        plan_precisions(
            model, feeds, judge, **options(max_loss=0.0001, min_overlap=0.999, pinned={"sensitive": "int8"})
        )


def test_wrong_options_are_refused(model, feeds, judge):
    with pytest.raises(InvalidInput, match="one budget"):
        plan_precisions(model, feeds, judge, runtime="onnxruntime")
    with pytest.raises(InvalidInput, match="one budget"):
        plan_precisions(model, feeds, judge, **options(target_size=0.5))
    with pytest.raises(InvalidInput, match="cannot be measured for tensorrt"):
        plan_precisions(model, feeds, judge, runtime="tensorrt", target_latency=0.5)
    with pytest.raises(InvalidInput, match="candidates has fp16"):
        plan_precisions(model, feeds, judge, runtime="onnxruntime", candidates=("fp16",), max_loss=0.01)
    with pytest.raises(InvalidInput, match="no block tower"):
        plan_precisions(model, feeds, judge, **options(pinned={"tower": "int8"}))
    with pytest.raises(InvalidInput, match="needs 128 users, 20 are given"):
        plan_precisions(model, {"x": feeds["x"][:20]}, judge, **options())


def test_an_engine_slower_than_fp32_is_not_chosen(model, feeds, judge, monkeypatch):
    """The measured time decides; here it is told, since which one is slower depends on the machine."""
    monkeypatch.setattr(planner, "time_share", lambda *_, **__: (1.2, 0.0))
    plan = plan_precisions(model, feeds, judge, runtime="onnxruntime", max_loss=0.05, min_overlap=0.5)
    assert set(plan.precisions.values()) == {"fp32"}
    assert any("slower on onnxruntime" in note for note in plan.notes)


def test_a_judge_whom_nobody_pleases_is_refused(model, feeds):
    with pytest.raises(InvalidInput, match="judge on more held-out users"):
        plan_precisions(model, feeds, lambda _: Judged(np.zeros(5), np.ones((5, 10), np.int64)), **options())
