"""Judges and measurements of a real staged release: what they say is what the served chain does, and damage
shows."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from builders import metrics
from builders.compress import graph
from builders.compress.judge.evaluation import Evaluation, _encoded
from builders.compress.judge.gate import verdict
from builders.compress.quantize.calibration import calibrate
from builders.compress.quantize.quantize import choices, quantize
from builders.compress.recipe import Gate
from builders.compress.session import open_onnx
from builders.data.dataset import Targets, open_dataset
from builders.encoders.checkpoint import open_encoders
from builders.encoders.encoding import UserEncoding
from builders.export.verifier import Verifier
from ensemble.errors import InvalidInput


def _stage(release_cache, shop, name):
    """The newest folder of a finished stage."""
    folders = (release_cache.folder(shop) / "repository" / ".build" / "shop").glob(f"{name}-*")
    return max(folders, key=lambda folder: folder.stat().st_mtime)


def _id_rows(release_cache, shop):
    """Training's id rows [I + 1, E], which item_encoder reads."""
    from builders.encoders.checkpoint import read_encoders
    from builders.presets import PRESETS
    from builders.ranker.checkpoint import read_ranker

    schema = open_dataset(_stage(release_cache, shop, "data")).schema
    ranker = read_ranker(_stage(release_cache, shop, "ranker"), schema, PRESETS["tiny"].ranker.model)
    return np.concatenate(
        [read_encoders(_stage(release_cache, shop, "encoders")).item_ids, ranker.item_id_features], axis=1
    )


@pytest.fixture(scope="module")
def evaluation(release_cache):
    dataset = open_dataset(_stage(release_cache, "sequences", "data"))
    folder = _stage(release_cache, "sequences", "export")
    return Evaluation(dataset, folder, item_id_embeddings=_id_rows(release_cache, "sequences"))


@pytest.fixture(scope="module")
def labelled(release_cache):
    return Evaluation(
        open_dataset(_stage(release_cache, "tiny", "data")), _stage(release_cache, "tiny", "export")
    )


def test_what_is_served_and_judged_of_histories_is_what_training_encoded(labelled, release_cache):
    dataset, verifier = labelled.dataset, labelled.verifier
    assert verifier.features.events.known, "the shop has kinds of events, and they add something"
    encoders = open_encoders(_stage(release_cache, "tiny", "encoders"), dataset.schema)
    users = np.arange(1, 65)
    ends = np.asarray(dataset.known_ends[users])
    encoded = UserEncoding(encoders, dataset, verifier.embeddings)(users, ends)
    np.testing.assert_allclose(verifier.encode_users(users, ends), encoded, atol=1e-3)
    held, targets = labelled._users(32), labelled._sample(32)
    served = verifier.user_tensors(targets.user_rows, targets.history_ends)
    names = ("history_embeddings", "history_features")
    for name, judged in held.feeds(names, slice(None)).items():
        np.testing.assert_array_equal(judged, served[name])


def _engine(evaluation, model):
    return (evaluation.folder / "engines" / model / "model.onnx").read_bytes()


def _damaged(model, rng, share):
    """A copy whose large matrices carry noise of `share` of their own spread, and whose small ones (the wide
    path) are turned round."""
    proto = onnx.load_from_string(model)
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.ndim == 2:
            noisy = (
                array + rng.normal(0, share * array.std(), array.shape).astype(np.float32)
                if array.size > 64
                else -array
            )
            tensor.CopyFrom(numpy_helper.from_array(noisy, tensor.name))
    return proto.SerializeToString()


def _copy_with(folder, target, model, engine):
    """A staged release with one engine replaced."""
    for path in folder.rglob("*"):
        if path.is_file():
            (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    (target / "engines" / model / "model.onnx").write_bytes(engine)
    return target


@pytest.mark.parametrize("model", ["user_encoder", "item_encoder", "ranker"])
def test_a_model_in_its_own_place_changes_nothing_and_damage_costs_gain(evaluation, model, rng):
    judge = evaluation.judge(model, users=300)
    own = judge(_engine(evaluation, model))
    again, worse = judge(_engine(evaluation, model)), judge(_damaged(_engine(evaluation, model), rng, 3.0))
    assert own.overlap(again) == 1.0
    assert np.array_equal(own.gains, again.gains)
    assert len(own.gains) == len(own.lists) == 300
    assert worse.gains.mean() < 0.9 * own.gains.mean()
    assert own.overlap(worse) < 0.9


def test_the_rankers_judge_gives_what_the_verifier_measures(evaluation):
    judged = evaluation.judge("ranker", users=200)(_engine(evaluation, "ranker"))
    targets = evaluation._sample(200)
    _, ranks = Verifier(evaluation.dataset, evaluation.folder).ranks(targets)
    np.testing.assert_allclose(judged.gains, metrics.gains(ranks["chain"], 10), atol=1e-12)


def test_the_user_encoders_judge_gives_the_verifiers_full_ranking(evaluation):
    judged = evaluation.judge("user_encoder", users=200)(_engine(evaluation, "user_encoder"))
    _, ranks = Verifier(evaluation.dataset, evaluation.folder).ranks(evaluation._sample(200))
    np.testing.assert_allclose(judged.gains, metrics.gains(ranks["user_encoder"], 10), atol=1e-12)


def test_an_item_that_the_user_has_had_is_missed_in_every_way(evaluation):
    """The chain shows nothing twice by default; a way that may answer with it would win where people buy
    again."""
    dataset = evaluation.dataset
    again = dataset.histories.item_rows[dataset.test.history_ends - 1]
    repeats = Targets(dataset.test.user_rows[:100], dataset.test.history_ends[:100], again[:100])
    verifier = Verifier(dataset, evaluation.folder)
    _, ranks = verifier.ranks(repeats)
    assert len(ranks) == 5
    for way, of in ranks.items():
        assert np.isinf(of).all(), way
    assert verifier.repeats(repeats) == 1
    assert verifier.repeats(dataset.test) < 1
    held = evaluation._ask(repeats)
    judged = evaluation._searched(_encoded(verifier.user_encoder, held), held)
    assert not judged.gains.any()


def test_the_item_encoders_feeds_give_the_rows_that_are_served(evaluation):
    feeds = evaluation.feeds("item_encoder", evaluation.dataset.num_items)
    rows = np.random.default_rng(0).permutation(evaluation.dataset.num_items) + 1
    found = open_onnx(_engine(evaluation, "item_encoder")).run(feeds)
    served = evaluation.verifier.features.item_reader.table[rows]
    np.testing.assert_allclose(found["item_embedding"], served["embedding"], atol=1e-4)
    np.testing.assert_allclose(found["item_features"], served["features"], atol=1e-4)


def test_feeds_are_the_contracts_tensors_of_users_that_never_judge(evaluation):
    for model in ("user_encoder", "ranker"):
        specs = evaluation.verifier.offline.recall, evaluation.feeds(model, 20)
        spec_names = {spec.name for spec in _spec(evaluation, model).inputs}
        assert specs[1].keys() == spec_names
        assert all(len(tensor) == 20 for tensor in specs[1].values())
    judging = evaluation._sample(10_000).user_rows
    assert not np.isin(evaluation._own_users, judging).any()
    assert len(judging) > len(evaluation._own_users)


def _spec(evaluation, model):
    from builders.index.staged import StagedRelease

    return StagedRelease(evaluation.folder).model(model)


def test_more_calibration_users_than_the_shop_has_are_refused_with_the_number_it_has(evaluation):
    with pytest.raises(
        InvalidInput,
        match=r"calibration_users = 5000: this shop has 300 for it.* set calibration_users = 300 or fewer",
    ):
        evaluation.feeds("ranker", 5000)


def test_bytes_that_are_no_model_and_unknown_models_are_one_line(evaluation):
    with pytest.raises(InvalidInput, match="ranker is not an ONNX model or is cut short") as error:
        evaluation.judge("ranker", users=20)(_engine(evaluation, "ranker")[:1000])
    assert "\n" not in str(error.value)
    with pytest.raises(
        InvalidInput, match="no engine 'rankr' to judge; engines: user_encoder, item_encoder, ranker"
    ):
        evaluation.judge("rankr")


def test_the_gate_bites_on_a_damaged_engine_and_lets_the_same_one_pass(evaluation, tmp_path, rng):
    reference = evaluation.measure(evaluation.folder)
    damaged = _copy_with(
        evaluation.folder, tmp_path / "damaged", "ranker", _damaged(_engine(evaluation, "ranker"), rng, 3.0)
    )
    bad = verdict(reference, evaluation.measure(damaged), Gate(samples=300), keeps_weights=True)
    assert {"NDCG@10", "top-10 overlap"} <= {row.figure for row in bad.rows if row.verdict == "FAIL"}
    same = verdict(reference, evaluation.measure(evaluation.folder), Gate(samples=300), keeps_weights=True)
    assert same.ok
    assert {(t.model, t.batch) for t in reference.timings} == {
        (m, b) for m in ("user_encoder", "item_encoder", "ranker") for b in (1, 8, 64)
    }
    assert all(t.ms > 0 for t in reference.timings)


def test_a_sabotaged_scale_of_a_quantized_engine_is_caught_and_the_honest_one_passes(evaluation, tmp_path):
    """One weight's scale times 8: on this shop NDCG@10 even rises by chance, but the lists are not the
    trained model's any more."""
    engine = _engine(evaluation, "user_encoder")
    low = {
        block.name: "int8"
        for block in graph.blocks(graph.load(engine))
        if "int8" in choices(block, "onnxruntime")
    }
    honest = quantize(
        engine, low, calibrate(engine, evaluation.feeds("user_encoder", 64), min_users=64), "onnxruntime"
    )
    sabotaged = onnx.load_from_string(honest)
    scale = next(
        t
        for t in sabotaged.graph.initializer
        if t.name.startswith("recency") and t.name.endswith("weight_int8_scale")
    )
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(8), scale.name))
    reference = evaluation.measure(evaluation.folder, file="none.onnx")
    for name, variant, failing in (
        ("honest", honest, set()),
        ("sabotaged", sabotaged.SerializeToString(), {"top-10 overlap"}),
    ):
        staged = _copy_with(evaluation.folder, tmp_path / name, "ranker", _engine(evaluation, "ranker"))
        (staged / "engines" / "user_encoder" / "int8.onnx").write_bytes(variant)
        found = verdict(reference, evaluation.measure(staged, file="int8.onnx"), Gate(), keeps_weights=True)
        assert {row.figure for row in found.rows if row.verdict == "FAIL"} == failing


def test_measured_ranking_is_the_verifiers(evaluation):
    measured = evaluation.measure(evaluation.folder, file="model.tensorrt.onnx")
    users, ranks = Verifier(evaluation.dataset, evaluation.folder).ranks(evaluation.dataset.test)
    assert np.array_equal(measured.users, users)
    assert np.array_equal(measured.ranks, ranks["chain"])
    assert measured.recalled.mean() == np.isfinite(ranks["recall"]).mean()
    assert measured.timings == ()
    assert any(name.startswith("kind: kind ") and mask.any() for name, mask in measured.slices.items())


def test_the_typed_engine_is_measured_where_it_is_asked_for(evaluation, tmp_path, rng):
    staged = _copy_with(evaluation.folder, tmp_path / "typed", "ranker", _engine(evaluation, "ranker"))
    (staged / "engines" / "ranker" / "model.tensorrt.onnx").write_bytes(
        _damaged(_engine(evaluation, "ranker"), rng, 3.0)
    )
    assert (
        evaluation.measure(staged, file="model.tensorrt.onnx").gains.mean()
        < 0.9 * evaluation.measure(staged).gains.mean()
    )


def test_a_labelled_shops_tasks_are_those_of_the_verifier(labelled):
    measured = labelled.measure(labelled.folder)
    report = Verifier(labelled.dataset, labelled.folder).task_metrics(labelled.dataset.test_impressions)
    assert [task.name for task in measured.tasks] == list(report)
    for task in measured.tasks:
        if task.kind == "binary":
            assert metrics.auc(task.labels, task.values) == pytest.approx(report[task.name]["auc"], abs=1e-9)
    assert verdict(measured, measured, Gate(samples=200)).ok
    with pytest.raises(InvalidInput, match="item_id_embeddings"):
        labelled.feeds("item_encoder", 8)
