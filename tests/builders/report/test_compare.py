"""`peregrine report --compare`: two releases side by side, and what is said of them."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import typer
from PIL import Image
from shops import private_copy
from typer.testing import CliRunner
from variants import gives_the_reverse, publish_variant, ranker

from builders.cli.report import report
from builders.report.compare import comparison_page, figure_rows, sentence, shared_users
from builders.report.thumbnails import SIDE, thumbnails
from ensemble.errors import InvalidInput
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


SHOP = """\
name = "tiny"
[interactions]
file = "log.csv"
[items]
file = "items.csv"
id = "item_id"
features = [{name = "photo", kind = "image", column = "file"}]
"""


def write_shop(folder: Path, files: dict[str, str]) -> Path:
    """A shop whose items name these files."""
    folder.mkdir(exist_ok=True)
    (folder / "shop.toml").write_text(SHOP)
    (folder / "items.csv").write_text("".join(["item_id,file\n", *(f"{i},{f}\n" for i, f in files.items())]))
    return folder


def write_picture(file: Path, size: tuple[int, int], colour: tuple[int, int, int], turned: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = turned
    Image.new("RGB", size, colour).save(file, exif=exif)


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_pictures_are_small_keep_their_shape_and_what_has_none_is_counted(tmp_path):
    names = {"a": "a.png", "b": "b.jpg", "c": "", "d": "gone.png", "e": "e.png"}
    shop = write_shop(tmp_path / "shop", names)
    write_picture(shop / "a.png", (200, 100), (250, 10, 10))
    write_picture(shop / "b.jpg", (300, 100), (10, 250, 10), turned=6)
    (shop / "e.png").write_text("no picture")
    found = thumbnails(shop, [b"b", b"a", b"c", b"d", b"e", b"unknown"], tmp_path)
    assert list(found.by_item) == [b"b", b"a"]
    assert opened(found.by_item[b"a"]).size == (SIDE, SIDE // 2)
    assert opened(found.by_item[b"b"]).size == (round(SIDE / 3), SIDE), "turned as EXIF says"
    red, green, _ = opened(found.by_item[b"a"]).getpixel((9, 9))
    assert red > 200 > 60 > green
    assert (found.without, found.missing) == (2, 2)
    assert found.note() == (
        "Pictures of 2 of the 6 items; 2 name none; 2 name one that is missing or cannot be read."
    )


def test_pictures_are_bounded_together(tmp_path, monkeypatch):
    shop = write_shop(tmp_path / "shop", {f"i{at}": f"{at}.png" for at in range(6)})
    for at in range(6):
        write_picture(shop / f"{at}.png", (64, 64), (40 * at, 0, 0))
    items = [f"i{at}".encode() for at in range(6)]
    whole = thumbnails(shop, items, tmp_path)
    monkeypatch.setattr("builders.report.thumbnails.MOST_BYTES", sum(map(len, whole.by_item.values())) - 1)
    found = thumbnails(shop, items, tmp_path)
    assert (len(found.by_item), found.too_many) == (5, 1)


def test_a_page_has_each_picture_once_beside_every_list_that_shows_it(both, tmp_path):
    first, second = both
    ids = [item.decode() for item in first.item_ids.sorted_ids.tolist()]
    shop = write_shop(tmp_path / "shop", {item: f"{item}.png" for item in ids})
    for at, item in enumerate(ids[:-1]):
        write_picture(shop / f"{item}.png", (16, 16), (at % 256, 90, 90))
    page = comparison_page(first, second, comparison(second, first), shop)
    shown = page.count('<i class="picture ')
    assert 20 < page.count("data:image/jpeg;base64,") < shown == page.count('<li class="pictured">')
    assert "<p>Pictures of " in page
    assert "data:image" not in comparison_page(first, second, comparison(second, first))


def test_a_shop_without_pictures_and_pictures_without_lists_are_refused(repository, tmp_path):
    shop = write_shop(tmp_path / "shop", {"a": ""})
    (shop / "shop.toml").write_text(SHOP.replace("image", "category"))
    with pytest.raises(InvalidInput, match="its items have no feature of kind image; leave --shop out"):
        thumbnails(shop, [b"a"], tmp_path)
    (app := typer.Typer()).command()(report)
    done = CliRunner().invoke(app, f"-r {repository} --shop {shop}")
    assert "--shop" in str(done.exception)
    assert "add --compare r1 r2" in str(done.exception)
