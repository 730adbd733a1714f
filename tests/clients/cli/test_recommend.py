"""`peregrine recommend` against a small gRPC server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from fake_triton import FakeTriton
from typer.testing import CliRunner

from clients.cli.recommend import DEFAULT_URL, Catalogue, _print_tables, _split, find_server, recommend
from clients.client import Client
from clients.results import Item, Recommendations
from ensemble.contract import Degraded
from ensemble.errors import InvalidArgument, InvalidInput


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    server = FakeTriton()
    yield server
    server.stop()


def run(*arguments: Any) -> str:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(recommend)
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False).output


def test_json_has_one_list_per_user(triton: FakeTriton, tmp_path: Path) -> None:
    first, second = json.loads(run("u1", "u2", "--json", "--url", triton.url, "--repository", tmp_path))
    assert first["items"][0] == {
        "item_id": "i1",
        "title": "",
        "score": 3.0,
        "probabilities": {"click": 0.5, "buy": 0.5},
    }
    assert (first["user_id"], first["release"], first["degraded"], first["recent"]) == ("u1", "r1", [], [])
    assert second["degraded"] == ["UNKNOWN_USER"]


def test_the_table_shows_items_scores_and_tasks(triton: FakeTriton, tmp_path: Path) -> None:
    text = run("u1", "--url", triton.url, "--repository", tmp_path)
    assert "u1 · release r1 · " in text
    assert all(word in text for word in ("item-2", "2.0000", "click", "buy", "0.5000"))
    assert "has no release r1; --repository names one" in " ".join(text.split()), "why no title is shown"


def long_list(score: float) -> list[Recommendations]:
    items = (
        Item(f"a-very-long-item-id-{place}" * 3, score, {"ctr": score, "cvr": 0.5}) for place in range(2)
    )
    return [Recommendations("u1", tuple(items), Degraded(0), "r1", 1.0)]


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_narrow_terminal_folds_ids_and_cuts_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(Catalogue, "titles", lambda self, ids: ["soft red lipstick of the summer"] * len(ids))
    _print_tables(long_list(0.5), Catalogue(tmp_path, "r1"))
    text = capsys.readouterr().out
    assert "…" not in text
    column = "".join(line.split("│")[2].strip() for line in text.splitlines() if line.count("│") > 4)
    assert "a-very-long-item-id-0" * 3 + "a-very-long-item-id-1" * 3 in column


def test_a_score_that_is_no_number_is_null_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triton: FakeTriton
) -> None:
    lists = long_list(float("nan"))
    monkeypatch.setattr(Client, "recommend_many", lambda self, users, **options: lists)
    output = run("u1", "--json", "--url", triton.url, "--repository", tmp_path)
    first = json.loads(output, parse_constant=pytest.fail)[0]["items"][0]
    assert (first["score"], first["probabilities"]) == (None, {"ctr": None, "cvr": 0.5})


def test_options_reach_the_server(triton: FakeTriton, tmp_path: Path) -> None:
    options = [
        "--session",
        "a,b",
        "--allow",
        "brand=X,Y",
        "--cap",
        "brand=2",
        "--weight",
        "buy=1.5",
        "--context",
        "device=phone",
        "--context",
        "hour=13",
        "--include-seen",
        "-k",
        "3",
    ]
    run("u1", *options, "--url", triton.url, "--repository", tmp_path)
    sent = triton.requests[0].parameters
    assert (sent["session_items"].string_param, sent["allow"].string_param) == (
        '["a","b"]',
        '{"brand":["X","Y"]}',
    )
    assert (sent["caps"].string_param, sent["weights"].string_param) == ('{"brand":2}', '{"buy":1.5}')
    assert sent["context"].string_param == '{"device":"phone","hour":"13"}'
    assert (sent["exclude_seen"].bool_param, sent["top_k"].int64_param) == (False, 3)


def test_bad_options_are_one_line(triton: FakeTriton, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInput, match=r"^--cap: expected NAME=VALUE with a fitting value, got 'brand=x'$"
    ):
        run("u1", "--cap", "brand=x", "--url", triton.url)
    triton.failures = [
        (
            "INVALID_ARGUMENT",
            "in ensemble 'recommend', in ensemble 'r1_recommend', top_k: must be 1..100, got 0",
        )
    ]
    with pytest.raises(InvalidArgument, match=r"^top_k: must be 1\.\.100, got 0$"):
        run("u1", "-k", "0", "--url", triton.url, "--repository", tmp_path)


def test_without_a_repository_there_is_a_default_server_and_no_titles(tmp_path: Path) -> None:
    assert find_server(tmp_path / "absent", None) == (DEFAULT_URL, {})
    assert find_server(tmp_path, "h:1") == ("h:1", {})
    catalogue = Catalogue(tmp_path, "r1")
    assert (catalogue.titles(["a"]), catalogue.recent("u1")) == ([""], [])


def test_commas_are_quoted_and_an_open_quote_is_named() -> None:
    assert _split('a, b,"c, d",e f') == ["a", "b", "c, d", "e f"]
    assert _split('"say ""hi"""') == ['say "hi"']
    assert (_split(""), _split(None)) == ([], None)
    with pytest.raises(InvalidInput, match="a double quote is not closed"):
        _split('"a,b')


def test_values_that_no_item_has_are_told(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, "r1")
    assert catalogue.strangers("--deny", {"brand": ["x"]}) == [], "a server elsewhere"
    catalogue._release = SimpleNamespace(vocabularies={"items": {"brand": ["Lumari", "Vena"]}})  # type: ignore
    assert catalogue.strangers("--deny", {"brand": ["Vena", "lumarri", "zzz"], "price": ["3"]}) == [
        "--deny brand: no item of the release has 'lumarri'; do you mean 'Lumari'?",
        "--deny brand: no item of the release has 'zzz'",
    ]
