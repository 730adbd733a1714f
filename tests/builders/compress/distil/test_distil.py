"""Distillation: the student comes to answer like its teacher, each loss does its own work, and every mistake
is named."""

import copy

import pytest
import torch
from small_modules import (
    CONFIG,
    ITEM_ENCODER,
    RANKER,
    SCHEMA,
    SIZES,
    USER_ENCODER,
    feeds_for,
    item_rows,
    ranker_labels,
    tensors,
    trained_ranker,
    trained_user_encoder,
)
from torch import nn

from builders.compress.distil.distil import (
    DistilLosses,
    attention_loss,
    distil,
    distil_loss,
    loss_parts,
    relation_loss,
)
from builders.compress.distil.students import student_ranker, student_user_encoder
from builders.compress.finetune import batches_from_feeds, finetune, inputs_of
from ensemble.errors import InvalidInput

HALF = {"hidden": 32, "expert": (32, 16), "tower": 16}


def _ranker_student(seed=0):
    return student_ranker(trained_ranker(), SCHEMA, CONFIG, HALF, seed)


def _ranker_batches(users=512, **more):
    return batches_from_feeds({**feeds_for(RANKER, users, seed=1), **more}, 32)


def _disagreement(student, teacher, feeds):
    """Mean absolute difference of click probabilities."""
    with torch.no_grad():
        return float((student(**feeds)[..., 0] - teacher(**feeds)[..., 0]).abs().mean())


def _first_choices(module, feeds):
    with torch.no_grad():
        return module(**feeds)[..., 0].argmax(1)


def test_a_distilled_ranker_agrees_with_its_teacher_more_than_one_trained_on_the_same_labels():
    teacher, held = trained_ranker(), tensors(feeds_for(RANKER, 128, seed=5))
    labels = ranker_labels(feeds_for(RANKER, 512, seed=1), noise=3.0)  # as noisy as clicks are
    untrained, by_labels = _ranker_student(), _ranker_student()
    finetune(
        by_labels,
        distil_loss(teacher, DistilLosses(kd=0, hard=1)),
        _ranker_batches(labels=labels),
        steps=80,
        learning_rate=3e-3,
    )
    student = distil(teacher, _ranker_student(), _ranker_batches(), steps=80, learning_rate=3e-3)
    found = {
        name: _disagreement(one, teacher, held)
        for name, one in (("kd", student), ("labels", by_labels), ("none", untrained))
    }
    assert found["kd"] < 0.8 * min(found["labels"], found["none"])
    same = {
        name: (_first_choices(one, held) == _first_choices(teacher, held)).float().mean()
        for name, one in (("kd", student), ("labels", by_labels))
    }
    assert same["kd"] > same["labels"]


def test_a_distilled_user_encoder_finds_its_teachers_items():
    teacher, held = trained_user_encoder(), tensors(feeds_for(USER_ENCODER, 128, seed=5))
    items = torch.nn.functional.normalize(
        torch.randn(200, SIZES.embedding, generator=torch.Generator().manual_seed(0)), dim=1
    )
    student = student_user_encoder(teacher, {"layers": 1, "heads": 2, "feed": 16})
    batches = batches_from_feeds(
        feeds_for(USER_ENCODER, 512, seed=1), 64, shared={"item_embeddings": items.numpy()}
    )

    def shared_items(module):
        with torch.no_grad():
            best, wanted = ((one(**held)[:, 0] @ items.T).topk(10).indices for one in (module, teacher))
        return float((best[:, :, None] == wanted[:, None]).any(2).float().mean())

    before = shared_items(student)
    distil(teacher, student, batches, steps=80, learning_rate=3e-3)
    assert not student.training
    assert shared_items(student) > before + 0.05


def test_an_item_encoder_is_distilled_output_by_output():
    teacher, feeds = item_rows(), feeds_for(ITEM_ENCODER, 64)
    student = copy.deepcopy(teacher)
    nn.init.normal_(student.encoder.mix[0].weight, std=0.1)
    loss, held = distil_loss(teacher, DistilLosses()), tensors(feeds)
    before = float(loss(student, held).detach())
    distil(teacher, student, batches_from_feeds(feeds, 32), steps=50, learning_rate=3e-3)
    assert float(loss(student, held).detach()) < 0.5 * before


@pytest.mark.parametrize("name", ["kd", "at", "rd", "hard"])
@pytest.mark.parametrize("model", ["ranker", "user_encoder"])
def test_each_loss_alone_falls_on_users_it_was_not_trained_on(model, name):
    losses = DistilLosses(**{"kd": 0.0, name: 1.0})
    if model == "ranker":
        teacher, student, spec = trained_ranker(), _ranker_student(), RANKER
        extra = lambda feeds: {"labels": ranker_labels(feeds)}  # noqa: E731
        shared = {}
    else:
        teacher, student, spec = (
            trained_user_encoder(),
            student_user_encoder(trained_user_encoder(), {"layers": 1, "heads": 2, "feed": 16}),
            USER_ENCODER,
        )
        items = torch.randn(50, SIZES.embedding, generator=torch.Generator().manual_seed(0)) / 4
        shared = {"item_embeddings": items.numpy()}
        extra = lambda feeds: {  # noqa: E731
            "target_items": (feeds["history_embeddings"][:, -1] @ items.numpy().T).argmax(1)
        }
    nn.init.normal_(next(p for n, p in student.named_parameters() if "attention" in n or "qkv" in n), std=0.3)
    train, held = feeds_for(spec, 256, seed=1), feeds_for(spec, 96, seed=5)
    batches = batches_from_feeds({**train, **extra(train)}, 32, shared=shared)
    judged = tensors({**held, **extra(held), **shared})

    def value():
        with torch.no_grad():
            parts = loss_parts(teacher, student, judged, losses)
        assert list(parts) == [name]
        return float(parts[name])

    before = value()
    distil(teacher, student, batches, losses, steps=60, learning_rate=5e-3)
    assert value() < 0.95 * before


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    teacher = trained_ranker()
    parts = loss_parts(
        teacher, copy.deepcopy(teacher), tensors(feeds_for(RANKER, 8)), DistilLosses(kd=1, at=1, rd=1)
    )
    assert all(abs(float(value.detach())) < 1e-5 for value in parts.values())


def test_the_sum_is_weighted_and_its_gradient_reaches_no_teacher():
    teacher, student, feeds = (
        copy.deepcopy(trained_ranker()),
        _ranker_student(),
        tensors(feeds_for(RANKER, 8)),
    )
    teacher.zero_grad()
    losses = DistilLosses(kd=0.5, at=2.0, rd=3.0)
    before = [parameter.clone() for parameter in teacher.parameters()]
    parts = loss_parts(teacher, student, feeds, losses)
    total = distil_loss(teacher, losses)(student, feeds)
    assert float(total.detach()) == pytest.approx(
        float((0.5 * parts["kd"] + 2 * parts["at"] + 3 * parts["rd"]).detach()), rel=1e-5
    )
    distil(teacher, student, _ranker_batches(64), losses, steps=2)
    assert all(
        torch.equal(old, new) and new.grad is None
        for old, new in zip(before, teacher.parameters(), strict=True)
    )


def test_the_same_seed_gives_the_same_student():
    def weights(seed):
        student = distil(trained_ranker(), _ranker_student(seed), _ranker_batches(64), steps=3, seed=seed)
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_relations_do_not_change_under_scale_and_rotation_or_width():
    samples = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    turned = 3 * samples @ torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    assert float(relation_loss(samples, torch.cat([turned, torch.zeros(40, 2)], 1))) < 1e-9
    assert (
        float(relation_loss(samples, torch.randn(40, 8, generator=torch.Generator().manual_seed(2)))) > 1e-2
    )
    same = torch.ones(5, 3, requires_grad=True)  # a student that says the same of all samples
    relation_loss(samples[:5], same).backward()
    assert torch.isfinite(same.grad).all()


def test_attention_of_the_last_layers_is_compared_whatever_the_number_of_heads():
    first, last = (torch.rand(2, 4, 5, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert float(attention_loss([first, last], [last.mean(1, keepdim=True)])) < 1e-9
    assert float(attention_loss([first, last], [first.mean(1, keepdim=True)])) > 1e-2


def test_padded_candidates_teach_nothing():
    teacher, student, feeds = trained_ranker(), _ranker_student(), feeds_for(RANKER, 4)
    padded = {name: array.copy() for name, array in feeds.items()}
    for name in padded:
        if name.startswith("candidate_"):
            padded[name][:, 8:] = 0
    cut = {name: array[:, :8] if name.startswith("candidate_") else array for name, array in padded.items()}
    values = [
        float(loss_parts(teacher, student, tensors(one), DistilLosses())["kd"].detach())
        for one in (padded, cut)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


class _Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.layer(values)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: DistilLosses.of({"kld": 1.0}),
            r"loss kld = 1\.0: there is no such loss; known: kd, at, rd, hard, temperature",
        ),
        (lambda: DistilLosses(kd=0.0), "all 0"),
        (lambda: DistilLosses(at=-1.0), r"at = -1\.0"),
        (lambda: DistilLosses(rd=float("nan")), "rd = nan"),
        (lambda: DistilLosses(temperature=0.0), r"temperature = 0\.0: want a number above 0"),
        (
            lambda: student_ranker(trained_ranker(), SCHEMA, CONFIG, {"width": 3}),
            "width = 3 is no width of it; known: attention",
        ),
        (
            lambda: student_user_encoder(trained_user_encoder(), {"dim": 16}),
            "dim = 16 is no width of it; known: feed, heads, layers",
        ),
        (lambda: student_user_encoder(trained_user_encoder(), {"heads": 3}), "heads divides 32"),
        (
            lambda: distil(
                trained_ranker(), _ranker_student(), _ranker_batches(8), DistilLosses(hard=1), steps=1
            ),
            "hard > 0 needs labels",
        ),
        (
            lambda: distil(
                _Plain(), _Plain(), lambda rng: {"values": torch.ones(2, 4)}, DistilLosses(at=1), steps=1
            ),
            "shows no attention map",
        ),
        (lambda: inputs_of(_Plain(), {"value": torch.ones(2)}), "feeds lack values"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(act, message):
    with pytest.raises(InvalidInput, match=message):
        act()
