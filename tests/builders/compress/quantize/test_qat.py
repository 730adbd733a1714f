"""QAT: its rounding is that of the served int8 graph, and it wins back what plain quantization loses."""

import copy

import numpy as np
import pytest
import torch
from small_modules import RANKER, feeds_for, tensors, trained_ranker
from torch import nn

from builders.compress import graph
from builders.compress.finetune import batches_from_feeds
from builders.compress.quantize.calibration import calibrate
from builders.compress.quantize.qat import Grid, grids, qat, rounding
from builders.compress.quantize.quantize import quantize
from builders.export.onnx_export import export_model
from ensemble.engines.onnx import open_session
from ensemble.errors import InvalidInput

RUNTIMES = ["onnxruntime", "tensorrt"]
CALIBRATION = feeds_for(RANKER, 32, seed=2)


@pytest.fixture(scope="module")
def rough():
    """trained_ranker's very function, from weights that 8 bits hurt: four large columns stretch the scale of
    all others."""
    module = copy.deepcopy(trained_ranker())
    with torch.no_grad():
        met = (module.candidate_in, module.user_in, module.state_in)
        for tensor in (*(layer.weight for layer in met), module.candidate_in.bias):
            tensor[:4] /= 400
        for expert in module.experts:
            expert[0].weight[:, :4] *= 400
    return module.eval()


@pytest.fixture(scope="module")
def exported(rough, tmp_path_factory):
    return _onnx(rough, tmp_path_factory.mktemp("qat"))


def _onnx(module, folder):
    export_model(module, RANKER, folder / "model.onnx", CALIBRATION)
    return (folder / "model.onnx").read_bytes()


@pytest.fixture(scope="module")
def chosen(exported):
    """(int8 for every linear layer of the experts and the layer before, ranges of real users)."""
    names = [
        block.name
        for block in graph.blocks(graph.load(exported))
        if block.name.startswith(("experts", "candidate_in"))
    ]
    return dict.fromkeys(names, "int8"), calibrate(exported, CALIBRATION, min_users=16)


def _answers(model, feeds):
    session = open_session(model, fuse=False)
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})[0]


def _logits(probabilities):
    """Of clicks: where errors are not hidden by the sigmoid."""
    clicks = np.clip(probabilities[..., 0].astype(np.float64), 1e-6, 1 - 1e-6)
    return np.log(clicks / (1 - clicks))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_training_rounds_as_the_served_graph_does(rough, exported, chosen, runtime):
    precisions, ranges = chosen
    served = _answers(quantize(exported, precisions, ranges, runtime), CALIBRATION)
    tuned = copy.deepcopy(rough)
    with torch.no_grad():
        whole = tuned(**tensors(CALIBRATION)).numpy()
        with rounding(tuned, grids(exported, precisions, ranges, runtime)):
            found = tuned(**tensors(CALIBRATION)).numpy()
        after = tuned(**tensors(CALIBRATION)).numpy()
    rounded_off = np.abs(_logits(whole) - _logits(served)).mean()
    assert rounded_off > 1e-3
    assert np.abs(_logits(found) - _logits(served)).mean() < 0.15 * rounded_off
    assert np.array_equal(whole, after)  # the rounding ends with the block


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_fine_tuning_lowers_the_error_of_the_int8_graph_on_unseen_users(
    rough, exported, chosen, runtime, tmp_path
):
    precisions, ranges = chosen
    batches = batches_from_feeds(feeds_for(RANKER, 256, seed=3), 32)
    tuned = qat(rough, exported, precisions, ranges, batches, runtime=runtime, steps=100, learning_rate=5e-5)
    held = feeds_for(RANKER, 96, seed=8)
    with torch.no_grad():
        wanted = _logits(rough(**tensors(held)).numpy())

    def error(model):
        return float(
            np.sqrt(
                np.square(
                    _logits(_answers(quantize(model, precisions, ranges, runtime), held)) - wanted
                ).mean()
            )
        )

    assert error(_onnx(tuned, tmp_path)) < 0.7 * error(exported)
    assert not tuned.training
    assert [name for name, _ in tuned.named_parameters()] == [name for name, _ in rough.named_parameters()]


def test_gradients_pass_through_the_rounding_and_stop_beyond_the_range():
    grid = Grid(torch.full((3,), 0.1), torch.full((3,), -128.0), torch.full((3,), 127.0))
    values = torch.tensor([[0.26, 20.0, -20.0]], requires_grad=True)
    rounded = grid.round_input(values)
    rounded.sum().backward()
    assert torch.allclose(rounded, torch.tensor([[0.3, 12.7, -12.8]]))
    assert values.grad.tolist() == [[1.0, 0.0, 0.0]]
    weight = torch.randn(4, 3, requires_grad=True)
    grid.round_weight(weight).sum().backward()
    assert torch.allclose(weight.grad, torch.ones(4, 3), atol=1e-5)


def test_the_same_seed_gives_the_same_weights(rough, exported, chosen):
    def weights(seed):
        tuned = qat(rough, exported, *chosen, batches_from_feeds(CALIBRATION, 8), steps=2, seed=seed)
        return torch.cat([p.detach().flatten() for p in tuned.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_precisions_without_int8_layers_is_refused(rough, exported, chosen):
    batches = batches_from_feeds(CALIBRATION, 8)
    with pytest.raises(InvalidInput, match="none of candidate_in is a linear layer at int8"):
        qat(rough, exported, {"candidate_in": "fp32"}, chosen[1], batches, steps=1)
    with pytest.raises(InvalidInput, match="none of candidate_in is a linear layer at int8"):
        qat(nn.Linear(2, 2), exported, {"candidate_in": "int8"}, chosen[1], batches, steps=1)
