"""Pruning: shares are exact, zeros stay zeros, channels and heads go whole, and the smaller module is
exported like any other."""

import copy

import numpy as np
import pytest
import torch
from small_modules import (
    ITEM_ENCODER,
    RANKER,
    USER_ENCODER,
    feeds_for,
    item_rows,
    tensors,
    trained_ranker,
    trained_user_encoder,
)
from torch import nn

from builders.compress.distil.distil import DistilLosses, distil_loss
from builders.compress.finetune import batches_from_feeds, finetune, inputs_of
from builders.compress.prune.channels import families
from builders.compress.prune.prune import magnitude, size, structured, two_four
from builders.export.onnx_export import export_model
from ensemble.errors import InvalidInput

MODULES = {
    "ranker": (trained_ranker, RANKER),
    "user_encoder": (trained_user_encoder, USER_ENCODER),
    "item_encoder": (item_rows, ITEM_ENCODER),
}


class Residual(nn.Module):
    """A user's own module: a stem, blocks with LayerNorm around residual sums, a head. Its inner width is
    free."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.stem, self.head = nn.Linear(10, width), nn.Linear(width, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.inner = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.outer = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        states = torch.relu(self.stem(values))
        for norm, inner, outer in zip(self.norms, self.inner, self.outer, strict=True):
            states = states + outer(torch.relu(inner(norm(states))))
        return self.head(states)


def _values(users=16):
    return {"values": torch.randn(users, 10, generator=torch.Generator().manual_seed(0))}


def _linear_weights(module):
    return [part.weight for part in module.modules() if isinstance(part, nn.Linear)]


def _zeros(module):
    weights = _linear_weights(module)
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


# --- single weights


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("per_layer", [False, True])
def test_magnitude_takes_exactly_the_share_and_the_smallest(share, per_layer):
    before, module = trained_ranker(), copy.deepcopy(trained_ranker())
    masks = magnitude(module, share=share, per_layer=per_layer)
    zeros, total = sum(int((~kept).sum()) for kept in masks.kept.values()), _zeros(module)[1]
    wanted = (
        sum(round(share * w.numel()) for w in _linear_weights(module)) if per_layer else round(share * total)
    )
    assert zeros == wanted
    assert _zeros(module)[0] == max(wanted, _zeros(before)[0])
    assert masks.share == pytest.approx(wanted / total)
    for old, new in zip(_linear_weights(before), _linear_weights(module), strict=True):
        gone = new == 0
        if per_layer and gone.any():
            assert old[gone].abs().max() <= old[~gone].abs().min()
        assert torch.equal(old[~gone], new[~gone])


def test_magnitude_by_threshold_takes_what_is_below_it():
    module = copy.deepcopy(trained_ranker())
    wanted = sum(int((w.abs() < 0.05).sum()) for w in _linear_weights(module))
    magnitude(module, threshold=0.05)
    assert _zeros(module)[0] == wanted > _zeros(trained_ranker())[0]


def test_two_four_leaves_the_two_largest_of_every_four_inputs():
    before, module = trained_ranker(), copy.deepcopy(trained_ranker())
    masks = two_four(module)
    pruned = 0
    for old, new in zip(_linear_weights(before), _linear_weights(module), strict=True):
        if old.shape[1] % 4:
            assert torch.equal(old, new)
            continue
        groups, whole = new.unflatten(1, (-1, 4)), old.unflatten(1, (-1, 4)).abs()
        assert ((groups != 0).sum(-1) <= 2).all()
        assert torch.allclose(groups.abs().sum(-1), whole.topk(2).values.sum(-1))
        pruned += 1
    assert pruned > 5
    assert masks.share == 0.5


@pytest.mark.parametrize("prune", [lambda m: magnitude(m, share=0.6), two_four])
def test_masks_survive_fine_tuning_which_brings_the_answers_back(prune):
    teacher, module = trained_ranker(), copy.deepcopy(trained_ranker())
    masks, held = prune(module), tensors(feeds_for(RANKER, 64, seed=9))
    zeros = _zeros(module)[0]
    loss = distil_loss(teacher, DistilLosses())
    with torch.no_grad():
        before = loss(module, held)
    finetune(
        module,
        loss,
        batches_from_feeds(feeds_for(RANKER, 256, seed=1), 32),
        steps=60,
        learning_rate=3e-3,
        repairs=(masks,),
    )
    assert _zeros(module)[0] == zeros
    assert not module.training
    assert loss(module, held) < 0.8 * before


def test_fine_tuning_is_the_same_from_the_same_seed():
    def tuned(seed):
        module = copy.deepcopy(trained_ranker())
        batches = batches_from_feeds(feeds_for(RANKER, 64, seed=1), 16)
        losses = finetune(
            module,
            lambda m, f: m(**inputs_of(m, f)).square().mean(),
            batches,
            steps=5,
            seed=seed,
            dropout=True,
        )
        return losses, torch.cat([p.detach().flatten() for p in module.parameters()])

    (first, weights), (second, again), (other, _) = tuned(3), tuned(3), tuned(4)
    assert first == second
    assert torch.equal(weights, again)
    assert first != other


# --- whole channels and heads


@pytest.mark.parametrize("name", MODULES)
def test_structured_keeps_multiples_and_is_exported_like_any_module(name, tmp_path):
    make, spec = MODULES[name]
    module, feeds = make(), feeds_for(spec, 24)
    smaller = structured(module, 0.5, tensors(feeds), round_to=16)
    assert size(smaller, tensors(feeds)).mflops < 0.85 * size(module, tensors(feeds)).mflops
    for (label, old), new in zip(module.named_modules(), smaller.modules(), strict=True):
        if isinstance(old, nn.Linear):
            assert new.out_features == old.out_features or new.out_features % 16 == 0, label
            assert new.weight.shape == (new.out_features, new.in_features)
    assert export_model(smaller, spec, tmp_path / "model.onnx", feeds) < 1e-4


def test_structured_takes_whole_heads_and_their_bias():
    module, feeds = copy.deepcopy(trained_user_encoder()), tensors(feeds_for(USER_ENCODER, 16))
    dead = torch.zeros(32, dtype=torch.bool)
    dead[8:16] = dead[24:] = True  # heads 1 and 3 of 4
    with torch.no_grad():
        for block in module.blocks:
            block.qkv.weight[dead.repeat(3)] = 0
            block.qkv.bias[dead.repeat(3)] = 0
            block.out.weight[:, dead] = 0
            block.feed[0].weight[::2] = block.feed[0].bias[::2] = 0
            block.feed[3].weight[:, ::2] = 0
        module.distance_bias.normal_()
        wanted = module(**feeds)
        smaller = structured(module, 0.5, feeds)
    assert [block.heads for block in smaller.blocks] == [2, 2]
    assert [block.bias_rows for block in smaller.blocks] == [[0, 2], [0, 2]]
    assert smaller.blocks[0].qkv.out_features == 3 * 16
    assert torch.allclose(smaller(**feeds), wanted, atol=1e-5)


def test_structured_takes_a_rankers_heads_with_all_that_reads_them():
    module, feeds = copy.deepcopy(trained_ranker()), tensors(feeds_for(RANKER, 16))
    smaller = structured(module, 0.5, feeds)
    assert (module.attention.heads, smaller.attention.heads) == (2, 1)
    assert smaller.attention.position.shape[0] == 1
    assert smaller.attended_product.in_features == 16
    # the history's mean and newest item
    assert smaller.user.layer.in_features == module.user.layer.in_features - 2 * 16


def test_structured_goes_through_residual_sums_and_layer_norms():
    torch.manual_seed(0)
    module, feeds = Residual(), _values()
    smaller = structured(module, 0.5, feeds)
    assert (smaller.stem.out_features, smaller.norms[0].normalized_shape, smaller.head.in_features) == (
        32,
        (32,),
        32,
    )
    assert [layer.out_features for layer in smaller.inner] == [64, 64]
    assert (smaller.head.out_features, smaller.stem.in_features) == (3, 10)
    stream = next(family for family in families(module, feeds) if "stem" in family.layers)
    assert stream.layers == ["outer.0", "outer.1", "stem"]


def test_structured_takes_out_what_is_zero_first_and_answers_the_same():
    torch.manual_seed(0)
    module = Residual(width=32)
    with torch.no_grad():
        for inner, outer in zip(module.inner, module.outer, strict=True):
            inner.weight[::2] = inner.bias[::2] = 0
            outer.weight[:, ::2] = 0
        module.stem.weight[::2] = module.stem.bias[::2] = module.outer[0].bias[::2] = module.outer[1].bias[
            ::2
        ] = 0
        module.head.weight[:, ::2] = 0
        for part in (*module.inner, *module.norms):
            part.weight[..., ::2] = 0
        for outer in module.outer:
            outer.weight[::2] = 0
        # a norm over fewer channels is another norm
        module.norms = nn.ModuleList(nn.Identity() for _ in range(2))
        smaller = structured(module, 0.5, _values())
        assert (smaller.stem.out_features, smaller.inner[0].out_features) == (16, 32)
        assert torch.allclose(smaller(**_values()), module(**_values()), atol=1e-6)


def test_taylor_importance_drops_a_channel_that_never_fires_however_large_its_weights():
    torch.manual_seed(0)
    module = Residual(width=16)
    with torch.no_grad():
        module.inner[0].weight[5] *= 50
        module.inner[0].bias[5] = -1e4
        dead = module.inner[0].weight[5].clone()
    by_norm = structured(module, 0.5, _values())
    by_loss = structured(module, 0.5, _values(), loss=lambda m, f: m(**f).square().mean())
    holds = lambda m: bool((m.inner[0].weight == dead).all(1).any())  # noqa: E731
    assert holds(by_norm)
    assert not holds(by_loss)


def test_a_width_that_forward_fixes_stays():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(10, 32), nn.Linear(32, 1)

        def forward(self, values):
            return self.second(torch.relu(self.first(values)).view(-1, 32))

    with pytest.raises(InvalidInput, match="nothing to take out"):
        structured(Fixed(), 0.5, _values())


def test_size_counts_parameters_zeros_and_operations_of_one_user():
    module, feeds = Residual(64), _values()
    magnitude(module, share=0.5)
    found = size(module, feeds)
    weights = sum(w.numel() for w in _linear_weights(module))
    assert found.parameters == sum(p.numel() for p in module.parameters())
    assert found.zeros == round(0.5 * weights) + 2 * 64  # and the biases with which LayerNorm starts
    assert found.mflops == pytest.approx(2 * weights / 1e6)  # zeros are multiplied too


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (lambda: magnitude(Residual(), share=1.0), r"share = 1\.0: want a share from 0"),
        (lambda: magnitude(Residual(), share=float("nan")), "share = nan"),
        (lambda: magnitude(Residual(), share=0.5, threshold=0.1), "either threshold or share"),
        (lambda: magnitude(Residual()), "either threshold or share"),
        (lambda: magnitude(Residual(), threshold=0.0), r"threshold = 0\.0: want a number above 0"),
        (lambda: magnitude(nn.LayerNorm(4), share=0.5), "LayerNorm has no linear layer"),
        (lambda: two_four(nn.Linear(6, 8)), "multiple of 4"),
        (lambda: structured(Residual(), -0.1, _values()), r"share = -0\.1"),
        (lambda: structured(Residual(), 0.5, _values(), round_to=0), "round_to = 0: want at least 1"),
        (
            lambda: structured(Residual(), 0.5, _values(), round_to=512),
            r"round_to = 512.* hidden widths: \[64, 128\]",
        ),
        (lambda: structured(Residual(), 0.5, {"other": torch.zeros(2, 10)}), "feeds lack values"),
        (
            lambda: finetune(Residual(), lambda m, f: f["values"].sum(), lambda rng: _values(), steps=0),
            "steps = 0",
        ),
        (
            lambda: finetune(
                Residual(), lambda m, f: f["values"].sum(), lambda rng: _values(), steps=1, learning_rate=0.0
            ),
            "learning_rate = 0",
        ),
        (
            lambda: finetune(
                Residual(), lambda m, f: m(**f).sum() * float("nan"), lambda rng: _values(), steps=1
            ),
            "the loss became nan",
        ),
        (
            lambda: batches_from_feeds({"a": np.zeros((2, 1)), "b": np.zeros((3, 1))}, 1),
            "same number of users",
        ),
    ],
)
def test_bad_options_are_one_line_that_says_what_to_do(prune, message):
    with pytest.raises(InvalidInput, match=message):
        prune()
