"""A meta-learned start for new users: its steps against autograd, what it learns, and the bench around it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from shops import write_sequences_shop

from builders.bench.first_clicks import main
from builders.bench.meta_start import MetaStart, Tasks, learn


def test_a_step_goes_down_the_weighted_loss_of_the_clicks(rng):
    items = torch.from_numpy(rng.normal(size=(9, 4)).astype(np.float32))
    model = MetaStart(np.zeros((1, 4), np.float32), steps=2, clicks=3)
    torch.nn.init.normal_(model.start)
    torch.nn.init.uniform_(model.sizes)
    torch.nn.init.normal_(model.ages)
    clicks = torch.tensor([[0, 3, 5], [0, 0, 7]])
    stepped = model(items[clicks], clicks > 0, items, torch.zeros(9))
    for row, own in zip(stepped, ([3, 5], [7]), strict=True):
        user = model.start[0].detach().requires_grad_()
        for size in model.sizes.detach():
            logits = (items @ user).repeat(len(own), 1)
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(own), reduction="none")
            loss = losses @ model.ages[-len(own) :].softmax(0).detach()
            (grad,) = torch.autograd.grad(loss, user)
            user = (user - size * grad).detach().requires_grad_()
        torch.testing.assert_close(row, user)


def test_the_start_learns_what_a_new_user_wants_by_the_first_click(rng):
    """Clicks of one half of the items lead to one item of it, those of the other to one of the other."""
    items = np.eye(8, dtype=np.float32)[np.repeat([0, 1], 6)] * 3
    items += rng.normal(0, 0.3, items.shape).astype(np.float32)
    items = np.concatenate([np.zeros((1, 8), np.float32), items])
    first = rng.integers(1, 13, 400)
    tasks = Tasks(np.stack([np.full(400, -1), first], axis=1), np.where(first <= 6, 2, 9))
    counts = np.bincount(np.concatenate([first, tasks.wanted]), minlength=13)
    learned = learn(items, counts, tasks, steps=1, groups=2, updates=100)
    assert learned.losses[-1] < learned.losses[0] - 0.1
    scores = learned.users(np.array([[-1, 4], [-1, 11]])) @ items[1:].T
    assert (scores.argmax(1) + 1).tolist() == [2, 9]
    again = learn(items, counts, tasks, steps=1, groups=2, updates=100)
    assert again.losses == learned.losses


def test_new_users_are_asked_by_every_way(tmp_path, capsys):
    shop = tmp_path / "shop"
    write_sequences_shop(shop, users=500, items=120)
    out = [
        "--out",
        str(tmp_path / "out"),
        "--preset",
        "tiny",
        "--set",
        "encoders.epochs=2",
        "--updates",
        "20",
    ]
    with pytest.raises(SystemExit):
        main([str(shop), *out])
    assert "the split leaves out 0 whole users" in capsys.readouterr().err
    toml, split = shop / "shop.toml", 'split = {kind = "random", validation = 0.2, test = 0.2}'
    toml.write_text(toml.read_text().replace('split = "leave_one_out"', split))
    main([str(shop), *out])
    printed = capsys.readouterr().out
    told = json.loads(printed[printed.index("{") :])
    ways = {"session", "recall", "meta", "popularity", "transition_knn", "session + meta", "recall + meta"}
    assert set(told["hr@10"]["1"]) == ways | {"targets", "users"}
    assert sum(told["hr@10"][str(n)]["targets"] for n in range(1, 6)) == told["hr@10"]["all"]["targets"]
    figures = told["hr@10"]["all"]
    assert figures["meta"] > 1.2 * 10 / 120, "better than chance"
    for way in ("session", "recall"):
        if not told["weights"][way]:
            assert figures[f"{way} + meta"] == figures[way]
