"""The ranker: its contract, its independence of padding and neighbours, its calibration, and training end to
end in seconds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_dataset import (
    ITEMS,
    NUM_ITEMS,
    NUM_USERS,
    SCHEMA,
    SIZES,
    TASKS,
    UNRATED,
    USERS,
    toy_dataset,
    toy_embeddings,
    zero_scores,
)

from builders import metrics
from builders.data.dataset import Dataset, Histories, Targets, history_windows
from builders.data.rates import rates_of, with_rates
from builders.learning import learning_lines
from builders.ranker import blend as blending
from builders.ranker import calibrate, next_items
from builders.ranker import config as config_module
from builders.ranker.blend import WHY_FEW, auc_within
from builders.ranker.calibrate import MIN_SCALE, fit_share_slope
from builders.ranker.checkpoint import open_ranker, read_ranker, save_ranker
from builders.ranker.config import BASE_TRAINING, TINY_TRAINING, num_batches_of, trained_as
from builders.ranker.lists import Lists, lists_from_impressions, states_of
from builders.ranker.loss import impression_loss
from builders.ranker.model import (
    TINY,
    CalibratedRanker,
    ItemFeatures,
    OwnRanker,
    Ranker,
    flops_per_user,
    num_parameters,
)
from builders.ranker.refit import refit_ranker
from builders.ranker.trainer import RankerTrainer, RunningMean
from builders.ranker.training import train_ranker
from ensemble import contract
from ensemble.activity import state_width, touches_width
from ensemble.errors import InvalidInput
from ensemble.schema import DEFAULT_SOURCES, Schema, Task
from ensemble.steps.blend import Blend


def _feeds(num_users, rng, num_candidates=SIZES.candidates):
    s = SIZES
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    feeds = {
        "history_features": normal(num_users, s.history, s.item_features),
        "history_mask": rng.random((num_users, s.history)) < 0.6,
        "user_codes": rng.integers(0, USERS.num_codes, (num_users, 1)).astype(np.int32),
        "user_values": normal(num_users, 1),
        "user_features": normal(num_users, s.user_features),
        "user_state": normal(num_users, state_width(SCHEMA)),
        "candidate_features": normal(num_users, num_candidates, s.item_features),
        "candidate_state": normal(num_users, num_candidates, touches_width(SCHEMA)),
        "candidate_scores": normal(num_users, num_candidates, len(DEFAULT_SOURCES)),
    }
    return {name: torch.from_numpy(array) for name, array in feeds.items()}


def _shaken(seed=0):
    """A ranker whose zero-initialized layers are random, so that every path shows in its answers."""
    torch.manual_seed(seed)
    ranker = Ranker(SCHEMA, TINY).eval()
    for parameter in ranker.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return ranker


# --- the module


def test_forward_names_and_shapes_are_the_contracts():
    feeds = _feeds(3, np.random.default_rng(0))
    assert tuple(feeds) == contract.RANKER_INPUTS
    answer = _shaken()(**feeds)
    assert answer.shape == (3, SIZES.candidates, len(TASKS))
    assert answer.dtype == torch.float32
    assert ((answer[..., :2] > 0) & (answer[..., :2] < 1)).all()


def test_padding_and_neighbours_do_not_change_a_candidate():
    ranker, feeds = _shaken(), _feeds(4, np.random.default_rng(0))
    with torch.no_grad():
        whole = ranker(**feeds)
        padded = {k: v.clone() for k, v in feeds.items()}
        for name in ("candidate_features", "candidate_state", "candidate_scores"):
            padded[name][:, 5:] = 0
        assert torch.allclose(ranker(**padded)[:, :5], whole[:, :5], atol=1e-6)
        alone = torch.cat([ranker(**{k: v[row : row + 1] for k, v in feeds.items()}) for row in range(4)])
    assert torch.allclose(alone, whole, atol=1e-6)


def test_what_stands_behind_the_mask_does_not_matter_and_an_empty_history_is_finite():
    ranker, feeds = _shaken(), _feeds(4, np.random.default_rng(0))
    with torch.no_grad():
        whole = ranker(**feeds)
        feeds["history_features"] = torch.where(
            feeds["history_mask"][..., None], feeds["history_features"], torch.tensor(7.0)
        )
        assert torch.allclose(ranker(**feeds), whole, atol=1e-6)
        feeds["history_mask"][:] = False
        assert torch.isfinite(ranker(**feeds)).all()


def test_an_untrained_ranker_has_the_order_of_its_wide_path_and_the_items_rates():
    ranker, feeds = Ranker(SCHEMA, TINY).eval(), _feeds(2, np.random.default_rng(0))
    with torch.no_grad():
        ranker.wide.weight[:] = torch.tensor([1.0, 2.0, 0.0])
        logits = ranker.logits(*feeds.values())[..., 0]
    fused = feeds["candidate_scores"][..., 0] + 2 * feeds["candidate_scores"][..., 1]
    fused = (
        fused + feeds["candidate_features"][..., SIZES.item_features - SIZES.item_rates]
    )  # the item's rate
    assert torch.equal(logits.argsort(1), fused.argsort(1))


def test_regression_is_a_line_and_binary_a_sigmoid_of_the_logits():
    ranker = Ranker(SCHEMA, TINY).eval()
    ranker.calibration_scale.copy_(torch.tensor([2.0, 1.0, 3.0]))
    ranker.calibration_bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
    answer = ranker.probabilities(torch.tensor([1.0, 0.0, 4.0]))
    assert answer.tolist() == pytest.approx([1 / (1 + np.exp(-2.5)), 0.5, 11.0])


def test_sizes_are_stated_and_grow_with_the_candidates():
    ranker = Ranker(SCHEMA, TINY)
    assert num_parameters(ranker) == sum(p.numel() for p in ranker.parameters())
    once, twice = flops_per_user(ranker, 100), flops_per_user(ranker, 200)
    assert 0 < twice - once < once + 1
    assert flops_per_user(ranker, 0) == 2 * once - twice


def test_onnx_export_gives_what_torch_gives_for_any_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    ranker, rng = _shaken(), np.random.default_rng(0)
    feeds = _feeds(2, rng)
    batch = torch.export.Dim("B", min=1, max=64)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        ranker,
        tuple(feeds.values()),
        str(path),
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=list(feeds),
        output_names=["candidate_probabilities"],
        dynamic_shapes={name: {0: batch} for name in feeds},
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for num_users in (1, 5):
        feeds = _feeds(num_users, rng)
        with torch.no_grad():
            wanted = ranker(**feeds).numpy()
        got = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})[0]
        np.testing.assert_allclose(got, wanted, atol=1e-5)


# --- lists and losses


def test_history_windows_are_left_padded_and_end_at_the_end():
    items, kinds = np.array([11, 12, 13, 21, 22]), np.ones(5, np.uint8)
    histories = Histories(np.array([0, 0, 3, 5]), items, np.arange(5), kinds)
    windows = history_windows(histories, np.array([1, 1, 2, 0]), np.array([3, 1, 5, 0]), 2)
    assert windows.tolist() == [[12, 13], [-1, 11], [21, 22], [-1, -1]]


def test_impressions_of_one_history_share_a_list_and_none_is_lost():
    dataset = toy_dataset()
    impressions = dataset.train_impressions
    rates = rates_of(dataset, impressions, 0.0)
    states = states_of(dataset, impressions, rates.of_rows[1], rates.of_rows[0])
    lists, places = lists_from_impressions(impressions, zero_scores, states)
    np.testing.assert_array_equal(
        lists.user_state.reshape(len(lists.labels) * lists.labels.shape[1], -1)[places], states.users
    )
    assert len(np.unique(places)) == len(places)
    column = lists.item_rows.shape[1]
    assert (lists.item_rows.ravel()[places] == impressions.item_rows).all()
    assert (lists.user_rows[places // column] == impressions.user_rows).all()
    assert (lists.history_ends[places // column] == impressions.history_ends).all()
    np.testing.assert_array_equal(lists.labels.reshape(-1, 3)[places], impressions.labels)
    assert (lists.item_rows > 0).sum() == len(places)
    assert np.isnan(lists.labels[lists.item_rows < 0]).all()


@pytest.mark.parametrize("age", [0.0, 0.1])
def test_training_reads_rates_that_are_as_old_as_its_settings_say(age):
    dataset = toy_dataset()
    config = replace(TINY_TRAINING, rate_age=age)
    ranker, rng = Ranker(dataset.schema, TINY), np.random.default_rng(0)
    trainer = RankerTrainer(dataset, toy_embeddings(), ranker, config, rng, lambda share, text: None)
    fresh, aged = (rates_of(dataset, dataset.train_impressions, old).of_rows for old in (0.0, 0.1))
    assert any((a != b).any() for a, b in zip(fresh, aged, strict=True))
    for read, of in zip(trainer.rates.of_rows, aged if age else fresh, strict=True):
        np.testing.assert_array_equal(read, of)


def test_a_conditional_task_is_trained_on_the_product_over_all_impressions():
    logits = torch.tensor([[[0.3, -0.7, 0.0]], [[-1.0, 0.2, 0.0]]])
    labels = torch.tensor([[[1.0, 0.0, float("nan")]], [[0.0, float("nan"), float("nan")]]])
    p = logits.sigmoid()
    click = -(p[0, 0, 0].log() + (1 - p[1, 0, 0]).log())
    product = -((1 - p[0, 0, 0] * p[0, 0, 1]).log() + (1 - p[1, 0, 0] * p[1, 0, 1]).log())
    assert float(impression_loss(TASKS)(logits, labels)) == pytest.approx(
        float(click + product) / 2, rel=1e-5
    )
    extreme = torch.full((1, 1, 3), 90.0, requires_grad=True)
    impression_loss(TASKS)(extreme, torch.tensor([[[1.0, 0.0, 1.0]]])).backward()
    assert torch.isfinite(extreme.grad).all()


def test_platt_scaling_recovers_a_planted_map_and_leaves_one_class_alone():
    rng = np.random.default_rng(0)
    logits = rng.normal(-2, 2, 100_000)
    labels = (rng.random(100_000) < 1 / (1 + np.exp(-(0.5 * logits - 1)))).astype(np.float32)
    scale, bias = calibrate.fit_platt(logits, labels)
    assert (scale, bias) == (pytest.approx(0.5, abs=0.03), pytest.approx(-1, abs=0.05))
    assert calibrate.fit_platt(logits, np.zeros(100_000)) == (1.0, 0.0)
    few = np.zeros(100_000)
    few[:3] = 1
    scale, bias = calibrate.fit_platt(logits, few)
    assert scale == pytest.approx(1.0)
    assert (1 / (1 + np.exp(-(scale * logits + bias)))).mean() == pytest.approx(3e-5, rel=0.01)
    assert calibrate.fit_platt(-logits, labels)[0] >= calibrate.MIN_SCALE
    assert calibrate.fit_line(logits, 3 * logits + 2) == (pytest.approx(3), pytest.approx(2))


# --- training


@pytest.fixture(scope="module")
def trained():
    dataset = toy_dataset()
    return dataset, train_ranker(
        dataset,
        toy_embeddings(),
        scores=zero_scores,
        config=replace(TINY_TRAINING, epochs=10, batch=256),
        seed=0,
    )


def test_training_comes_near_the_oracle_and_is_calibrated(trained):
    dataset, checkpoint = trained
    truth, labels = dataset.test_impressions.truth, dataset.test_impressions.labels
    figures = checkpoint.report["test"]
    for place, task in enumerate(("click", "buy")):
        assert figures[task]["auc"] > metrics.auc(labels[:, place], truth[:, place]) - 0.05
        noise = metrics.ece(labels[:, place], truth[:, place])  # what true probabilities show on so few rows
        assert figures[task]["ece"] < noise + 0.04
    assert figures["dwell"]["rmse"] < 1.15 * metrics.rmse(labels[:, 2], truth[:, 2])


def test_checkpoint_holds_rows_ready_for_the_snapshot(trained, tmp_path):
    dataset, checkpoint = trained
    assert checkpoint.item_features.shape == (NUM_ITEMS + 1, SIZES.item_features)
    assert checkpoint.user_features.shape == (NUM_USERS + 1, SIZES.user_features)
    assert not checkpoint.item_features[0].any()
    assert not checkpoint.user_features[0].any()
    inputs = (checkpoint.item_id_features, dataset.item_codes, dataset.item_values, toy_embeddings())
    with torch.no_grad():
        again = checkpoint.item_head(*map(torch.from_numpy, inputs))
    np.testing.assert_allclose(again.numpy()[1:], checkpoint.item_features[1:], atol=1e-6)
    save_ranker(checkpoint, tmp_path, TINY)
    feeds = _feeds(2, np.random.default_rng(0))
    for loaded in (read_ranker(tmp_path, SCHEMA, TINY), open_ranker(tmp_path, SCHEMA)):
        with torch.no_grad():
            assert torch.equal(loaded.ranker(**feeds), checkpoint.ranker(**feeds))
        assert loaded.report == checkpoint.report


def test_the_weights_kept_are_a_running_mean_and_the_exchange_undoes_itself():
    weight = torch.nn.Parameter(torch.zeros(2))
    mean, wanted = RunningMean([weight]), 0.0
    for step in range(1, 21):
        weight.data.fill_(step)
        mean.update(0.6)
        keep = min(0.6, step / (step + 9))
        wanted = keep * wanted + (1 - keep) * step
    mean.exchange()
    assert weight.tolist() == pytest.approx([wanted] * 2)
    mean.exchange()
    assert weight.tolist() == [20.0, 20.0]


def test_the_running_mean_is_what_a_labelled_shop_gets_and_0_keeps_the_last_weights():
    dataset, config = toy_dataset(num_impressions=2000), replace(TINY_TRAINING, epochs=1)
    first, last = (
        train_ranker(dataset, toy_embeddings(), scores=zero_scores, config=replace(config, average=keep))
        for keep in (0.99, 0.0)
    )
    assert first.report["validation"] != last.report["validation"]


def test_the_straight_way_of_the_item_head_is_trained_with_labels_only(trained):
    assert trained[1].item_head.direct.weight.any()
    assert not _interact(informative=True)[1].item_head.direct.weight.any()


def test_the_same_seed_trains_the_same_ranker():
    dataset, config = toy_dataset(num_impressions=2000), replace(TINY_TRAINING, epochs=1)
    first, second, other = (
        train_ranker(dataset, toy_embeddings(), scores=zero_scores, config=config, seed=seed)
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first.item_features, second.item_features)
    assert np.array_equal(first.user_features, second.user_features)
    assert first.report == second.report
    assert not np.array_equal(first.user_features, other.user_features)


class _Own(torch.nn.Module):
    """A user's ranker: probabilities from recall's first score and a bias per task."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(SIZES.item_features + 1, len(TASKS))

    def forward(
        self,
        history_features,
        history_mask,
        user_codes,
        user_values,
        user_features,
        user_state,
        candidate_features,
        candidate_state,
        candidate_scores,
    ):
        raw = self.layer(torch.cat([candidate_features, candidate_scores[..., :1]], -1))
        return torch.cat([raw[..., :2].sigmoid(), raw[..., 2:]], -1)


def test_a_users_own_ranker_is_trained_and_calibrated_too():
    dataset = toy_dataset()
    torch.manual_seed(0)  # its weights are those that it comes with
    own = _Own()
    checkpoint = train_ranker(
        dataset, toy_embeddings(), scores=zero_scores, config=TINY_TRAINING, ranker=own, seed=0
    )
    assert isinstance(checkpoint.ranker, OwnRanker)
    assert checkpoint.report["test"]["buy"]["auc"] > 0.55  # brands differ in how well they sell
    noise = metrics.ece(dataset.test_impressions.labels[:, 0], dataset.test_impressions.truth[:, 0])
    assert checkpoint.report["test"]["click"]["ece"] < noise + 0.04
    assert isinstance(checkpoint.ranker, CalibratedRanker)


def test_a_users_own_ranker_that_does_not_stay_finite_is_refused():
    class Overflows(_Own):
        def forward(self, *tensors):
            return super().forward(*tensors) * float("nan")

    with pytest.raises(InvalidInput, match="loss of held-out exposures is nan"):
        train_ranker(
            toy_dataset(num_impressions=2000),
            toy_embeddings(),
            scores=zero_scores,
            config=TINY_TRAINING,
            ranker=Overflows(),
            seed=0,
        )


# --- a shop without labels

INTERACT = Schema("toy", ITEMS, USERS, (Task("interact", "binary"),), UNRATED)


def _interact(informative, seed=0):
    """A shop whose recall puts the target anywhere; if `informative`, the item's brand alone tells which
    candidate it is."""
    rng, dataset = np.random.default_rng(seed), toy_dataset(INTERACT)
    users = np.arange(NUM_USERS) % NUM_USERS + 1
    many = np.tile(users, 10)
    brand = dataset.item_codes[:, 0]
    liked = np.flatnonzero(brand == 2 + 1) if informative else np.arange(1, NUM_ITEMS + 1)
    targets = Targets(many, dataset.histories.offsets[many] + 2, rng.choice(liked, len(many)))
    dataset = replace(dataset, validation=targets, test=targets)

    def candidates(user_rows, history_ends):
        order = (
            np.random.default_rng(len(user_rows))
            .random((len(user_rows), NUM_ITEMS))
            .argsort(1)[:, : SIZES.candidates]
            + 1
        )
        scores = np.zeros((*order.shape, 3), np.float32)
        scores[..., 0] = -np.arange(order.shape[1]) / 10
        return order, scores

    config = replace(TINY_TRAINING, epochs=4, batch=256, id_dropout=0.5)
    return dataset, train_ranker(
        dataset,
        toy_embeddings(),
        scores=zero_scores,
        candidates=candidates,
        source_weights=(1.0, 0.0, 0.0),
        config=config,
    )


def test_interact_learns_an_order_better_than_recalls_where_there_is_one():
    _, checkpoint = _interact(informative=True)
    assert checkpoint.report["deep_path"]
    figures = checkpoint.report["validation"]
    assert figures["ndcg@10"]["ranker"] > figures["ndcg@10"]["recall"] + 0.02
    assert figures["interact"]["ece"] < 0.05


def test_interact_falls_back_to_recalls_order_where_there_is_nothing_to_learn():
    _, checkpoint = _interact(informative=False)
    assert not checkpoint.report["deep_path"]
    assert checkpoint.report["test"]["ndcg@10"]["ranker"] == checkpoint.report["test"]["ndcg@10"]["recall"]
    assert checkpoint.report["test"]["interact"]["ece"] < 0.05


def test_interact_that_gains_nothing_at_high_rates_is_tried_over_one_epoch(monkeypatch):
    begun = []

    def fit(self, draw, loss_function, judge):
        begun.append(int(self.config.epochs))
        kept = int(begun[-1] == 1)
        return kept, [{"epoch": at, "validation": -0.5 - 0.1 * kept} for at in range(kept + 1)]

    monkeypatch.setattr(RankerTrainer, "fit", fit)
    _, checkpoint = _interact(informative=True)
    assert begun == [TINY_TRAINING.list_epochs, 1]
    assert checkpoint.report["longer"] == [{"epochs": begun[0], "kept": 0, "validation": -0.5}]
    assert checkpoint.report["kept_epoch"] == 1


def test_lists_that_gain_below_the_tenth_place_are_kept(monkeypatch):
    """NDCG@10 of few held-out users is noise: as long as it is not likely lost, their loss decides."""
    monkeypatch.setattr(next_items.metrics, "gains", lambda ranks, k: np.zeros(len(ranks)))
    _, checkpoint = _interact(informative=True)
    assert checkpoint.report["deep_path"]


def test_the_best_scale_of_scores_gives_the_positives_the_most():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(400, 12))
    drawn = (2.5 * scores + rng.gumbel(size=scores.shape)).argmax(axis=1)  # by a softmax of slope 2.5
    labels = (np.arange(12) == drawn[:, None]).astype(np.float32)
    labels[:, -1] = np.where(drawn == 11, 1, np.nan)
    told = np.arange(12) < 11
    slope = fit_share_slope(scores, labels)
    assert slope == pytest.approx(2.5, rel=0.15)
    assert fit_share_slope(10 * scores + 3, labels) == pytest.approx(slope / 10, rel=1e-4)
    assert fit_share_slope(np.where(told, scores, -np.inf), np.where(told, labels, np.nan)) > 0
    assert fit_share_slope(-scores, labels) == pytest.approx(MIN_SCALE, rel=0.2), "an order is never turned"
    assert fit_share_slope(scores, np.zeros_like(scores)) == 1.0


def test_training_without_labels_or_candidates_is_refused():
    with pytest.raises(ValueError, match="candidates"):
        train_ranker(toy_dataset(INTERACT), toy_embeddings(), scores=zero_scores, config=TINY_TRAINING)


def test_item_head_reads_the_contracts_tensors():
    head = ItemFeatures(SCHEMA, TINY)
    codes, values = torch.zeros(5, ITEMS.code_width, dtype=torch.int32), torch.zeros(5, ITEMS.value_width)
    out = head(torch.zeros(5, SIZES.item_features), codes, values, torch.zeros(5, SIZES.embedding))
    assert out.shape == (5, SIZES.item_features)
    assert torch.isfinite(out).all()


# --- how strongly rows are learned


def test_the_rows_setting_that_held_out_rows_like_best_is_trained_and_refitted_with(monkeypatch):
    config = replace(TINY_TRAINING, row_rate=1e-4, id_dropout=0.5, epochs=1, tried_rows=((1.0, 0.0),))
    monkeypatch.setattr(RankerTrainer, "passes", lambda self, *_: 1 - self.config.row_rate / 10)
    dataset, begun = toy_dataset(num_impressions=2000), []
    restart = RankerTrainer.restart
    monkeypatch.setattr(
        RankerTrainer,
        "restart",
        lambda self, config: (begun.append(config), restart(self, config))[1],
    )
    checkpoint = train_ranker(dataset, toy_embeddings(), scores=zero_scores, config=config)
    tried = checkpoint.report["rows_tried"]
    assert [one["row_rate"] for one in tried] == [1.0, 1e-4], tried
    assert tried[0]["validation"] < tried[1]["validation"]
    assert (begun[-1].row_rate, begun[-1].id_dropout, begun[-1].epochs) == (1.0, 0.0, 1)
    refit_ranker(
        dataset,
        toy_embeddings(),
        checkpoint,
        1000,
        config=config,
        progress=lambda *_: None,
    )
    assert (begun[-1].row_rate, begun[-1].id_dropout) == (1.0, 0.0)


def test_of_settings_as_good_as_each_other_the_slowest_rows_are_trained_with(monkeypatch):
    config = replace(TINY_TRAINING, epochs=1, tried_rows=((1e-4, 0.5), (1e-3, 0.3)))
    monkeypatch.setattr(RankerTrainer, "passes", lambda self, *_: 1 - self.config.row_rate / 10)
    checkpoint = train_ranker(
        toy_dataset(num_impressions=500), toy_embeddings(), scores=zero_scores, config=config
    )
    assert checkpoint.report["rows_tried"][0]["row_rate"] == 1e-4, "a thousandth of the loss is no gain"


@pytest.mark.parametrize("is_small", [True, False])
def test_the_size_that_held_out_exposures_like_best_is_kept_and_refitted(monkeypatch, tmp_path, is_small):
    large = replace(TINY_TRAINING, epochs=1, tried_rows=(), tries_small=True, model=replace(TINY, hidden=48))
    monkeypatch.setattr(config_module, "TINY_TRAINING", replace(TINY_TRAINING, epochs=1, tried_rows=()))
    fit, losses = RankerTrainer.fit, {48: 0.5, TINY.hidden: 0.4 if is_small else 0.6}

    def fit_with(self, *arguments):
        kept, curve = fit(self, *arguments)
        return kept, [{**one, "validation": losses[self.config.model.hidden]} for one in curve]

    monkeypatch.setattr(RankerTrainer, "fit", fit_with)
    dataset = toy_dataset(num_impressions=1000)
    said: list[str] = []
    kept = train_ranker(
        dataset,
        toy_embeddings(),
        scores=zero_scores,
        config=large,
        progress=lambda done, text: said.append(text),
    )
    assert kept.report["is_small"] is is_small
    assert kept.report["losses"] == {"large": 0.5, "small": losses[TINY.hidden]}
    assert (kept.ranker.user_in.out_features == TINY.hidden) is is_small
    (tmp_path / "it").mkdir()
    save_ranker(kept, tmp_path / "it", trained_as(large, kept.report).model)
    opened = open_ranker(tmp_path / "it", dataset.schema)
    known = len(dataset.train_impressions.times) - 100
    again = refit_ranker(dataset, toy_embeddings(), opened, known, config=large, progress=lambda *_: None)
    assert again.ranker.user_in.out_features == kept.ranker.user_in.out_features
    assert ("the small one is served" if is_small else "the large one is served") in said[-1]
    assert said[-1] in learning_lines({"ranker": again.report})[1]


def test_who_tries_no_rows_tries_none_in_the_small_ranker_either():
    assert config_module.small_of(replace(BASE_TRAINING, tried_rows=())).tried_rows == ()
    assert config_module.small_of(BASE_TRAINING).tried_rows == TINY_TRAINING.tried_rows


def test_what_recall_counted_of_the_training_clicks_tells_the_ranker_of_a_labelled_shop_nothing():
    dataset = toy_dataset(num_impressions=500)
    labels = dict(zip(*_pairs(dataset.train_impressions), strict=True))

    def telling(user_rows, history_ends, item_rows):
        told = [[labels.get((u, i), 0.0) for i in row] for u, row in zip(user_rows, item_rows, strict=True)]
        return np.repeat(np.array(told, np.float32)[..., None], len(DEFAULT_SOURCES), -1)

    plain, misled = (
        train_ranker(dataset, toy_embeddings(), scores=of, config=replace(TINY_TRAINING, epochs=1))
        for of in (zero_scores, telling)
    )
    assert plain.report["test"] == misled.report["test"]


def _pairs(impressions) -> tuple[list[tuple[int, int]], list[float]]:
    pairs = zip(impressions.user_rows.tolist(), impressions.item_rows.tolist(), strict=True)
    return list(pairs), np.nan_to_num(impressions.labels[:, 0]).tolist()


# --- the blend of tasks and recall

BLEND_CONFIG = replace(TINY_TRAINING, epochs=1, tried_rows=())


def _blended(dataset: Dataset, known: bool):
    """Trains against a recall that puts the true item first (`known`), or any item."""
    rng = np.random.default_rng(0)
    targets = dataset.validation
    true = dict(zip(targets.user_rows.tolist(), targets.item_rows.tolist(), strict=True))

    def candidates(user_rows, history_ends):
        rows = np.stack([rng.permutation(NUM_ITEMS)[: SIZES.candidates] + 1 for _ in user_rows])
        for line, user in enumerate(user_rows.tolist()):
            rest = rows[line][rows[line] != true[user]][: SIZES.candidates - 1]
            rows[line] = np.insert(rest, 0 if known else rng.integers(len(rest) + 1), true[user])
        scores = np.zeros((*rows.shape, len(DEFAULT_SOURCES)), np.float32)
        scores[..., 0] = np.linspace(3, -3, SIZES.candidates)
        return rows, scores

    def scores(user_rows, history_ends, item_rows):
        return np.zeros((*item_rows.shape, len(DEFAULT_SOURCES)), np.float32)

    return train_ranker(dataset, toy_embeddings(), scores=scores, candidates=candidates, config=BLEND_CONFIG)


def test_a_recall_that_knows_the_next_item_is_never_surely_worsened():
    checkpoint = _blended(toy_dataset(num_impressions=2000), known=True)
    report = checkpoint.report["blend"]
    assert report["tried"][0]["ruled_out"], "tasks alone throw away what recall knows"
    assert not report["tried"][report["chosen"]]["ruled_out"]
    assert not checkpoint.blend.uses_tasks or checkpoint.blend.power > 0
    assert not report["tried"][-1]["ruled_out"], "recall's own order can always be kept"


def _ruled_out(second_by_tasks, second_by_recall, most: float) -> bool:
    """Of lists of two, says where tasks alone and where recall put the true item second [L] bool: are tasks
    ruled out?"""
    count = len(second_by_tasks)
    items, none = np.tile([1, 2], (count, 1)), np.zeros((count, 1, 1), np.float16)
    labels = np.tile([1.0, 0.0], (count, 1)).astype(np.float32)[..., None]
    values, first = (
        np.stack([~second, second], axis=1).astype(np.float32)
        for second in (second_by_tasks, second_by_recall)
    )
    scores = np.stack([first, first * 0, first * 0], axis=-1)
    lists = Lists(np.arange(count), np.arange(count), items, scores, labels, none, none)
    recall = Blend(False, 1.0, (1.0, 0.0, 0.0), 1.0, 0.0)
    tasks = replace(recall, uses_tasks=True, power=0.0)
    asked = {"next items": blending._Asked(lists, values, np.ones(count))}
    return blending._tried(tasks, asked, None, recall, most)["ruled_out"]


@pytest.mark.parametrize("shows_lists", [False, True])
def test_what_is_likely_worse_is_left_out_unless_the_shop_chose_what_it_showed(shows_lists):
    """Tasks alone put the true item second in 24 of 40 lists and first in 16, where recall does the reverse:
    worse in 9 of 10 resamples, and not surely so."""
    worse = np.arange(40) < 24
    assert _ruled_out(worse, ~worse, blending._most_doubt(shows_lists)) is not shows_lists


@pytest.mark.parametrize(("lists", "is_out"), [(5, False), (100, True)])
def test_what_is_surely_but_hardly_worse_stays(lists, is_out):
    second = np.arange(1000) < lists
    assert _ruled_out(second, np.zeros(1000, bool), blending._most_doubt(False)) is is_out


def test_a_recall_that_knows_nothing_leaves_the_order_to_the_tasks():
    checkpoint = _blended(toy_dataset(num_impressions=2000), known=False)
    assert checkpoint.blend.uses_tasks


def test_a_conversion_behind_the_last_event_of_the_log_is_asked_about_too():
    dataset = toy_dataset(num_impressions=2000)
    shown = dataset.validation_impressions
    last = shown.user_rows == NUM_USERS
    ends = np.where(last, len(dataset.histories.times), shown.history_ends)
    labels = shown.labels.copy()
    labels[last, :2] = 1
    dataset = replace(dataset, validation_impressions=replace(shown, history_ends=ends, labels=labels))
    assert "blend" in _blended(dataset, known=True).report


def test_a_shop_with_numbers_alone_has_a_blend_and_too_few_items_are_said():
    dataset = toy_dataset(num_impressions=2000)
    schema = replace(SCHEMA, tasks=(Task("dwell", "regression"),))

    def alone(part):
        return replace(part, labels=np.nan_to_num(part.labels[:, 2:]), truth=part.truth[:, 2:])

    parts = ("train_impressions", "validation_impressions", "test_impressions")
    dataset = replace(
        dataset, schema=with_rates(schema), **{name: alone(getattr(dataset, name)) for name in parts}
    )
    few = Targets(*(of[:5] for of in vars(dataset.validation).values()))
    report = _blended(replace(dataset, validation=few, test=few), known=True).report
    assert report["blend"] == {"why": WHY_FEW, "power": 1.0}
    assert "tried" in _blended(dataset, known=True).report["blend"]


def test_auc_within_counts_pairs_of_one_user(rng):
    users, scores = rng.integers(0, 5, 60), rng.permutation(60).astype(float)
    labels = rng.random(60) < 0.4
    right = total = 0
    for a in np.flatnonzero(labels):
        for b in np.flatnonzero(~labels & (users == users[a])):
            right, total = right + (scores[a] > scores[b]), total + 1
    assert auc_within(users, scores, labels) == right / total
    assert auc_within(users, scores, np.zeros(60, bool)) == 0.5


def test_a_small_log_is_cut_into_finer_batches():
    assert [num_batches_of(n, 2048) for n in (10, 60_000, 77_000, 1_000_000)] == [1, 117, 150, 488]
    assert num_batches_of(10_000, 512) == 20, "what is small already stays"


@pytest.mark.parametrize(
    ("figures", "wanted", "longer"),
    [
        # by epochs: the kept one, and its validation
        ({8: (2, 0.5), 2: (2, 0.4)}, 2, [8]),
        ({8: (2, 0.5), 2: (1, 0.4), 1: (1, 0.3)}, 1, [8, 2]),
        ({8: (2, 0.5), 2: (1, 0.6)}, 8, []),
        ({8: (5, 0.5)}, 8, []),
        ({8: (0, 0.5), 1: (0, 0.5)}, 8, []),
        ({8: (0, 0.5), 1: (1, 0.4)}, 1, [8]),
    ],
    ids=["better", "better twice", "worse", "no early stall", "never better than before", "better if short"],
)
def test_a_training_that_stalls_early_is_tried_with_rates_that_fall_by_then(
    monkeypatch, figures, wanted, longer
):
    begun = []

    def fit(self, draw, loss_function, judge):
        epochs = int(self.config.epochs)
        begun.append(float(self.user_rows.weight.detach()[1].sum()))
        self.user_rows.weight.data.fill_(epochs)
        self.read_users[:] = True
        kept, figure = figures[epochs]
        return kept, [{"epoch": at, "validation": figure} for at in range(epochs + 1)]

    monkeypatch.setattr(RankerTrainer, "fit", fit)
    config = replace(TINY_TRAINING, epochs=8, tried_rows=())
    checkpoint = train_ranker(toy_dataset(), toy_embeddings(), scores=zero_scores, config=config)
    assert [one["epochs"] for one in checkpoint.report["longer"]] == longer
    assert checkpoint.report["epochs"] == wanted
    assert checkpoint.user_features.max() == wanted
    assert len(begun) == len(figures)
    assert len(set(begun)) == 1  # each begins from the same weights
