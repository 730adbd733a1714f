"""`peregrine report --compare`: two releases side by side, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from shops import private_copy
from typer.testing import CliRunner
from variants import gives_the_reverse, publish_variant, ranker

from builders.cli.report import report
from builders.report.compare import comparison_page, figure_rows, sentence, shared_users
from ensemble.local import LocalPipeline
from ensemble.release.compared import comparison
from ensemble.release.held_out import Comparison
from ensemble.steps.served import ServedRelease, open_served


@pytest.fixture
def repository(tiny_repository: Path, tmp_path: Path) -> Path:
    """A repository with r1, and r2 that ranks the other way round."""
    repository = private_copy(tiny_repository, tmp_path / "repository")
    publish_variant(repository, "r1", "r2", tmp_path, ranker(gives_the_reverse))
    return repository


@pytest.fixture
def both(repository: Path) -> list[ServedRelease]:
    return [open_served(repository, name) for name in ("r1", "r2")]


def test_a_user_sees_what_each_release_would_show(both):
    first, second = both
    page = comparison_page(first, second, comparison(second, first))
    user = shared_users(first, second)[7]
    lists = [LocalPipeline(release).recommend([user], {"top_k": 10})["item_ids"][0] for release in both]
    assert set(lists[0]) != set(lists[1])
    row = page[page.index(f"<td>{user.decode()}</td>") :].split("</tr>")[0]
    for release, ids, others, cell in zip(both, lists, lists[::-1], row.split("<ol>")[1:], strict=True):
        titles = release.item_titles[release.item_ids.rows_from_ids(ids)]
        for title, item in zip(titles, ids, strict=True):
            name = (title or item).decode()
            assert f"<li>{f'<b>{name}</b>' if item not in others else name}</li>" in cell
    assert page.count("<ol>") == 2 * len(shared_users(first, second)) > 20


def test_every_figure_of_both_is_there_with_its_difference():
    first = {"tasks": {"ctr": {"auc": 0.7, "rows": 9}, "cvr": {"auc": None}}, "ranking": {"ways": {}}}
    second = {"tasks": {"ctr": {"auc": 0.75}, "cvr": {"auc": 0.6}}}
    assert figure_rows(first, second) == [["ctr: auc", "0.7", "0.75", "+0.0500"]]
    assert figure_rows({}, second) == []


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.1, 0.2, "r2 is better than r1: "),
        (-0.2, -0.1, "r2 is worse than r1: "),
        (-0.1, 0.1, "r2 and r1 cannot"),
    ],
)
def test_the_verdict_is_said_in_a_sentence(low, high, words):
    assert sentence(Comparison(99, 0.5, (low + high) / 2, low, high), "r1", "r2").startswith(words)
    assert sentence(Comparison(0, why_not="no rows"), "r1", "r2") == (
        "Cannot tell whether r2 is worse than r1: no rows."
    )


def test_the_command_writes_the_page_and_says_the_verdict(repository, tmp_path):
    (app := typer.Typer()).command()(report)
    arguments = f"-r {repository} --compare r1 r2 --out {tmp_path / 'c.html'}"
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "r2 and r1 cannot be told apart: " in done.output
    assert (tmp_path / "c.html").read_text().startswith("<!doctype html>")
