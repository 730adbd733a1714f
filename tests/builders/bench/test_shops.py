"""Whether the product still ranks shops as well as it did: records of a release, and two held together."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builders.bench.shops.__main__ import main, record_release
from builders.bench.shops.against import SAME, shared_rows
from builders.bench.shops.building import Built
from builders.bench.shops.record import column, read_record

COST = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 2**20, "skipped": [], "stages": {}}
CODE = {"code": {"commit": None, "changed": None, "digest": "0" * 16}}


@pytest.fixture(scope="module")
def old(repository, tmp_path_factory):
    """A folder with the record of the tiny shop's release; read it only."""
    out = tmp_path_factory.mktemp("old")
    record_release(Built(repository, "r1", COST), CODE, out, "shop")
    return out


@pytest.fixture
def new(old, tmp_path):
    """A second run's folder, with the same record: to be changed."""
    return shutil.copytree(old, tmp_path / "new")


def _run(*arguments):
    """Runs the command with preset `tiny`: its exit code."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments), "--preset", "tiny"])
    return end.value.code


def _changed(folder, kind, change):
    """Changes a table of the shop's record."""
    path = folder / f"shop.{kind}"
    pq.write_table(change(pq.read_table(path)), path)


def _set(table, name, values):
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def _changed_facts(folder, change):
    path = folder / "shop.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def _verdicts(capsys):
    """Gives the verdict of each figure that --json printed."""
    [of] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["shops"].values()
    changes = of["against"]["changes"]
    return {(one["of"], one["way"], one["figure"]): one["verdict"] for one in changes}


def test_the_figures_are_those_of_the_releases_report(old, kept):
    record, report = read_record(old, "shop"), kept.manifest["report"]
    values = {figure.name: figure.value for figure in record.figures}
    for way, of in report["ranking"]["ways"].items():
        for figure in ("ndcg@10", "hr@10", f"recall@{kept.dataset.schema.sizes.candidates}"):
            assert values["next item", way, figure] == pytest.approx(of[figure])
    for task, of in report["tasks"].items():
        for figure in {"auc", "ece", "rmse"} & set(of):
            assert values[task, "ranker", figure] == pytest.approx(of[figure], abs=1e-6)
        simple = report["baselines"]["tasks"][task]
        assert values[task, "two_rates", simple["figure"]] == simple["ways"]["two_rates"]["value"]
    assert values["worth", "chain", "worth of an item shown"] == report["worth"]["ways"]["chain"]["worth"]
    gains = column(record.users, "gain_chain")
    assert gains.mean() == pytest.approx(report["ranking"]["ways"]["chain"]["ndcg@10"])


def test_the_same_release_twice_differs_in_nothing(old, new, tiny_shop, capsys):
    assert _run(tiny_shop, "--out", new, "--against", old, "--json") == 0
    printed = capsys.readouterr()
    [of] = json.loads(printed.out, parse_constant=pytest.fail)["shops"].values()
    changes = of["against"]["changes"]
    assert {change["difference"] for change in changes} == {0}
    verdicts = {(change["of"], change["way"]): change["verdict"] for change in changes}
    assert verdicts["next item", "chain"] == verdicts["ctr", "ranker"] == verdicts["worth", "chain"] == SAME
    assert verdicts["ctr", "two_rates"] == verdicts["build", ""] == "without interval"
    assert "shop: is done, by the code of digest 000000000000; --force builds it again" in printed.err
    assert re.search(
        r"^shop: no difference seen in \d\d figures; 1 s of CPU \(1 s\), 1 MiB", printed.err, re.MULTILINE
    )


def test_lists_upside_down_are_surely_worse_and_recall_is_as_it_was(old, new, tiny_shop, capsys):
    def turned(table):
        places = column(table, "place_chain")
        worse = np.where(places <= 20, 21 - places, places)
        return _set(table, "place_chain", pa.array(worse, mask=np.isnan(worse)))

    _changed(new, "parquet", turned)
    assert _run(tiny_shop, "--out", new, "--against", old) == 1
    printed = capsys.readouterr().out
    last = printed.splitlines()[-1]
    assert re.search(
        r"^shop: surely worse: next item, chain, ndcg@10 -0\.\d{4} \[-0\.\d{4}, -0\.\d{4}\]; ", last
    )
    assert "recall" not in last
    assert "95% interval" in printed
    assert "whether the training had bad luck, another --seed of both runs says" in printed
    assert "serves order of lists: tasks" in printed


def test_noise_in_a_tasks_values_is_worse_and_its_absence_better(old, new, tiny_shop, rng, capsys):
    def noisy(table):
        values = column(table, "ranker_ctr")
        return _set(table, "ranker_ctr", np.clip(values + rng.normal(0, 0.3, len(values)), 0.001, 0.999))

    _changed(new, "tasks.parquet", noisy)
    assert _run(tiny_shop, "--out", new, "--against", old, "--json") == 1
    verdicts = _verdicts(capsys)
    assert verdicts["ctr", "ranker", "auc"] == verdicts["ctr", "ranker", "ece"] == "surely worse"
    assert verdicts["cvr", "ranker", "auc"] == verdicts["next item", "chain", "ndcg@10"] == SAME
    assert _run(tiny_shop, "--out", old, "--against", new, "--json") == 0
    verdicts = _verdicts(capsys)
    assert verdicts["ctr", "ranker", "auc"] == verdicts["ctr", "ranker", "ece"] == "surely better"


def test_what_is_served_otherwise_or_measured_no_more_is_said(old, new, tiny_shop, capsys):
    def change(facts):
        facts["serves"] |= {"order of lists": "recall's own", "deep path": "off"}
        gone = next(figure for figure in facts["figures"] if figure["way"] == "chain")
        facts["figures"].remove(gone)

    _changed_facts(new, change)
    assert _run(tiny_shop, "--out", new, "--against", old) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "serves otherwise: order of lists is recall's own, was tasks x relevance ^ " in last
    assert "serves otherwise: deep path is off, was not told" in last
    assert "gone: next item, chain, ndcg@10" in last


def test_rows_are_paired_by_user_and_item_whatever_their_order(old, new, tiny_shop, capsys):
    for kind in ("parquet", "tasks.parquet"):
        _changed(new, kind, lambda table: table.slice(7).take(np.arange(len(table) - 7)[::-1]))
    assert _run(tiny_shop, "--out", new, "--against", old, "--json") == 0
    [of] = json.loads(capsys.readouterr().out)["shops"].values()
    assert len(of["against"]["notes"]) == 2
    assert re.fullmatch(r"\d+ held-out next items are in both, of \d+ and \d+", of["against"]["notes"][0])
    _changed(new, "parquet", lambda table: _set(table, "user_id", [f"else {at}" for at in range(len(table))]))
    assert _run(tiny_shop, "--out", new, "--against", old, "--json") == 1
    assert _verdicts(capsys)["next item", "chain", "hr@10"] == "no rows in common"


def test_rows_that_are_alike_are_told_apart_by_their_order():
    first = pa.table({"user_id": ["a", "b", "a"], "item_id": ["x", "x", "x"]})
    second = pa.table({"user_id": ["a", "a", "a", "c"], "item_id": ["x", "x", "x", "x"]})
    assert shared_rows(first, second, ("user_id", "item_id")).tolist() == [[0, 2], [0, 1]]


def test_a_shop_of_which_nothing_comes_out_is_said_and_the_others_go_on(
    old, new, tiny_shop, tmp_path, capsys
):
    assert _run(tmp_path / "missing", tiny_shop, "--out", new, "--against", old) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"missing: nothing came out: {tmp_path}/missing: no such folder; name the folder"
    )
    assert lines[-1].startswith("shop: no difference seen")


def test_force_builds_what_is_done_again(new, tmp_path, capsys):
    assert _run(tmp_path / "shop", "--out", new) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("shop: NDCG@10 of the served list 0.")
    assert _run(tmp_path / "shop", "--out", new, "--force") == 1
    assert "shop: nothing came out" in capsys.readouterr().out
    assert not any(path.name.startswith("shop.") for path in new.iterdir())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--seed", 1), "its record of shop is of preset tiny and seed 0, not tiny and 1; name another"),
        (("--against", "nowhere"), "--against nowhere: has no record of shop; name the --out"),
        (("--preset", "huge"), "--preset huge: unknown; known:"),
    ],
)
def test_what_cannot_be_run_so_is_refused_before_anything_is_built(new, tiny_shop, more, told, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(one) for one in (tiny_shop, "--out", new, "--preset", "tiny", *more)])
    assert end.value.code == 2
    assert f"error: {told}" in capsys.readouterr().err.replace(f"--out {new}: ", "")


@pytest.mark.long
def test_shops_are_built_by_the_products_own_command_and_a_broken_one_is_said(
    tiny_shop, repository, old, tmp_path, capsys
):
    """The release's stages are given, so that nothing is trained."""
    out = tmp_path / "out"
    shutil.copytree(repository / ".build", out / "repositories" / "shop" / ".build")
    (tmp_path / "broken").mkdir()
    assert _run(tmp_path / "broken", tiny_shop, "--out", out, "--against", old) == 1
    printed = capsys.readouterr()
    assert "broken: nothing came out: `peregrine build` ended with 2: error: " in printed.out
    assert f"its lines are in {out}/broken.log" in printed.out
    record, earlier = read_record(out, "shop"), read_record(old, "shop")
    assert record.figures == earlier.figures
    assert {"data", "encoders", "ranker", "verify"} <= set(record.facts["build"]["skipped"])
    assert record.facts["build"]["peak_bytes"] > 2**26
    assert record.facts["serves"] == earlier.facts["serves"]
    assert printed.out.splitlines()[-1].startswith("shop: no difference seen")
