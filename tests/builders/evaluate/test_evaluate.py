"""A release is asked about rows that its model has not seen, as its build asked it, and no others."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from shops import write_sequences_shop
from typer.testing import CliRunner

from builders import metrics
from builders.build import BuildOptions, publication
from builders.cli import evaluate as command
from builders.compress.recipe import read_recipe
from builders.data.stage import load_dataset
from builders.evaluate.asked import asked_of, next_of_event, targets_at
from builders.evaluate.evaluation import evaluate, means_of
from builders.evaluate.kept import Kept
from builders.presets import preset
from ensemble.errors import InvalidInput, ReleaseError


def _run(*arguments):
    app = typer.Typer()
    app.command()(command.evaluate)
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_the_held_out_rows_give_the_figures_of_the_report(repository, kept, tmp_path):
    out = tmp_path / "new" / "ranks.parquet"
    done = _run("r1", "-r", repository, "--json", "--out", out)
    assert done.exit_code == 0, done.output
    found, report = json.loads(done.stdout), kept.manifest["report"]
    [one] = found["releases"]
    assert kept.manifest["refit"], "what is published has learned from these rows"
    for figure, of in one["ranking"].items():
        for way, value in of["ways"].items():
            assert value["value"] == pytest.approx(report["ranking"]["ways"][way][figure])
    for task, of in one["tasks"].items():
        for figure in of:
            assert of[figure] == pytest.approx(report["tasks"][task][figure], abs=1e-6)
    table = pq.read_table(out)
    places = table["place_chain"].to_numpy(zero_copy_only=False)
    ranks = np.where(np.isnan(places), np.inf, places - 1)
    assert metrics.ndcg(ranks, 10) == pytest.approx(found["mean"]["ndcg@10 chain"]["mean"])
    assert len(set(table["user_id"].to_pylist())) == len(table) == one["users"]


def test_at_a_time_each_user_is_asked_with_what_was_known_before_it(kept):
    dataset, until = kept.dataset, kept.test_begins()
    histories = dataset.histories
    targets = targets_at(dataset, until)
    wanted = {}
    for user in range(1, dataset.num_users + 1):
        own = slice(histories.offsets[user], histories.offsets[user + 1])
        items, times = histories.item_rows[own], histories.times[own]
        before = items[times < until].tolist()
        new = [item for item, time in zip(items, times, strict=True) if time >= until and item not in before]
        if before and new:
            wanted[user] = (len(before), new[0])
    known = targets.history_ends - histories.offsets[targets.user_rows]
    found = zip(targets.user_rows.tolist(), known.tolist(), targets.item_rows.tolist(), strict=True)
    assert {user: (count, item) for user, count, item in found} == wanted


def _funnel(folder):
    """A shop of views and buys whose test period begins at 90."""
    rng = np.random.default_rng(5)
    users, items, times = rng.integers(0, 20, 900), rng.integers(0, 60, 900), rng.integers(0, 100, 900)
    event = np.where(rng.random(900) < 0.3, "buy", "view")
    folder.mkdir()
    pq.write_table(
        pa.table({"user_id": users, "item_id": items, "time": times, "event": event}), folder / "x.parquet"
    )
    (folder / "shop.toml").write_text(
        'name = "small"\nsplit = "time"\n[interactions]\nfile = "x.parquet"\nevent = "event"\n'
        'impression = "view"\nhistory = ["view", "buy"]\n[[tasks]]\nname = "cvr"\nlabel = {event = "buy"}\n'
    )
    return Kept("r1", {}, load_dataset(folder), folder)


@pytest.mark.parametrize("at_the_time", [False, True])
def test_the_next_item_of_an_event_is_new_in_the_period_and_the_event_befell_it(tmp_path, at_the_time):
    kept = _funnel(tmp_path / "shop")
    histories, since = kept.dataset.histories, kept.test_begins()
    targets = next_of_event(kept, "buy", since if at_the_time else None)
    buy, wanted = 1 + kept.dataset.schema.events.index("buy"), {}
    for user in range(1, kept.dataset.num_users + 1):
        own = range(histories.offsets[user], histories.offsets[user + 1])
        for end in own:
            item = histories.item_rows[end]
            again = [e for e in own if histories.item_rows[e] == item]
            bought = any(histories.kinds[e] == buy and histories.times[e] >= since for e in again)
            before = sum(histories.times[e] < since for e in own)
            known = before if at_the_time else end - own[0]
            if again[0] == end and histories.times[end] >= since and bought and known:
                wanted[user] = (own[0] + known, item)
                break
    found = zip(targets.user_rows.tolist(), targets.history_ends, targets.item_rows, strict=True)
    assert {user: (end, item) for user, end, item in found} == wanted
    assert wanted
    with pytest.raises(
        InvalidInput, match="--event cart: there is none; the events of r1's histories are view, buy"
    ):
        asked_of(kept, None, None, "cart")


def test_the_training_period_is_refused_and_named(repository, kept):
    until = kept.trained.until
    with pytest.raises(InvalidInput, match="is inside the training period of release r1") as error:
        evaluate(repository, ["r1"], until=until)
    assert kept.trained.words() in str(error.value)
    assert "the test period begins at" in str(error.value)
    asked = asked_of(kept, until + 1, None)
    assert "have stopped the training and set the calibration" in asked.note
    assert asked_of(kept, kept.test_begins(), None).note == ""
    assert asked.impressions.times.min() > until


def test_users_are_those_of_the_file(repository, kept, tmp_path):
    some = [kept.dataset.user_ids[row - 1] for row in kept.dataset.test.user_rows[:5]]
    file = tmp_path / "users.txt"
    file.write_bytes(b"\n".join([*some, b"nobody", b"", some[0]]) + b"\n")
    done = _run("r1", "-r", repository, "--users", file, "--json")
    [one] = json.loads(done.stdout)["releases"]
    assert (one["users"], one["unknown_users"]) == (5, 1)
    table = _run("r1", "-r", repository, "--users", file)
    assert "5 users; 1 named ones are not the release's" in " ".join(table.output.split())
    assert "ndcg@10 chain" in table.output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--until", "yesterday"], "--until yesterday: is no time"),
        (
            ["--until", "2100-01-01"],
            "none of the users has an item that was new to them at or after 2100-01-01",
        ),
        (["--users", "missing.txt"], "--users missing.txt cannot be read"),
    ],
)
def test_what_cannot_be_asked_is_one_line(repository, options, told):
    done = _run("r1", "-r", repository, *options)
    assert isinstance(done.exception, InvalidInput)
    assert told in str(done.exception)


def test_an_out_that_cannot_be_written_leaves_nothing(repository, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.parquet").mkdir()
    for out in (tmp_path / "file" / "ranks.parquet", tmp_path / "taken.parquet"):
        done = _run("r1", "-r", repository, "--out", out)
        assert isinstance(done.exception, InvalidInput)
        assert f"cannot write {out}" in str(done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.parquet"]


def test_of_a_compressed_build_the_compressed_engines_are_kept(tmp_path):
    options = BuildOptions(tmp_path, tmp_path, preset("tiny"))
    assert publication(options, is_refit=True).verified == ("data", "export")
    compressed = replace(options, recipe=read_recipe("fast"))
    assert publication(compressed, is_refit=True).verified == ("data", "compress")


def test_unknown_users_alone_are_an_error(repository, tmp_path):
    (tmp_path / "users.txt").write_text("nobody\n")
    done = _run("r1", "-r", repository, "--users", tmp_path / "users.txt")
    assert "none of the 1 users is one of the release's" in str(done.exception)


def test_a_release_whose_stages_are_gone_or_unnamed_says_what_to_do(repository, kept, tmp_path):
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, ignore=shutil.ignore_patterns(".build", ".lock"))
    with pytest.raises(ReleaseError, match="is gone, of which a build keeps the newest three") as error:
        evaluate(copy, ["r1"])
    assert "has learned from all rows" in str(error.value)
    assert "build it again" in str(error.value)


def test_several_releases_give_mean_and_standard_error(repository, kept):
    [one] = evaluate(repository, ["r1"], user_ids=kept.dataset.user_ids[:200].tolist())
    ranking = json.loads(json.dumps(one.report["ranking"]))
    ranking["hr@10"]["ways"]["chain"]["value"] += 0.2
    means = means_of([one, replace(one, report={**one.report, "ranking": ranking})])
    value = one.report["ranking"]["hr@10"]["ways"]["chain"]["value"]
    assert means["hr@10 chain"] == pytest.approx({"mean": value + 0.1, "standard_error": 0.1})
    assert means["ndcg@10 chain"]["standard_error"] == 0


def test_without_one_moment_a_time_inside_a_users_training_is_refused(tmp_path):
    write_sequences_shop(tmp_path / "shop", users=60, items=40)
    dataset = load_dataset(tmp_path / "shop")
    kept = Kept("r1", {}, dataset, tmp_path)
    with pytest.raises(
        InvalidInput, match="took their next item after position 3 in the model's training"
    ) as error:
        asked_of(kept, 3, None)
    assert "leave out --until" in str(error.value)
    assert len(asked_of(kept, None, None).targets.user_rows) == len(dataset.test.user_rows)


def test_times_are_read_as_people_write_them():
    assert command.time_from_text("1700000000") == 1_700_000_000
    assert command.time_from_text("2023-11-14T22:13:20Z") == 1_700_000_000
    assert command.time_from_text("2023-11-14 23:13:20+01:00") == 1_700_000_000
    assert command.time_from_text("2023-11-14") == 1_699_920_000
