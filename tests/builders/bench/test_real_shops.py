"""Public data sets as shops: each row is what its source says, and nothing before the cut knows of what comes
after it."""

import gzip

import numpy as np
import pyarrow.parquet as pq
import pytest
from real_data import real_data

from builders.bench.real_shops.__main__ import MAKERS, main, write_shop
from builders.bench.real_shops.funnels import Exposure, funnel
from builders.data.stage import load_dataset

_FUNNEL = [Exposure("view", {"cart": "cart", "buy": "buy"}), Exposure("cart", {"buy_of_cart": "buy"})]


def _log(folder, rows):
    path = folder / "events.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("user,item,event,time\n" + "".join(f"{','.join(map(str, row))}\n" for row in rows))
    return path


def _rows(made):
    """Gives the rows of a shop by (user, item, event)."""
    return {(row["user_id"], row["item_id"], row["event"]): row for row in made.interactions.to_pylist()}


def test_a_label_is_a_later_event_and_training_knows_nothing_of_what_came_in_after_it(tmp_path):
    filler = [(9, 100 + n, kind, 10 * n) for kind in ("view", "cart") for n in range(1, 101)]
    rows = [
        (1, 1, "view", 20), (1, 1, "cart", 20), (1, 1, "buy", 30),  # at once, and later
        (1, 2, "view", 60), (1, 2, "buy", 50),  # bought before it was viewed
        (2, 1, "view", 40), (2, 1, "buy", 950),  # bought when the test period had begun
        (2, 3, "view", 960), (2, 3, "cart", 970), (2, 3, "buy", 980),
    ]  # fmt: skip
    made = funnel("small", _log(tmp_path, filler + rows), _FUNNEL, ["view", "cart", "buy"])
    of = _rows(made)
    assert [of[1, 1, "view"][task] for task in ("cart", "buy", "buy_of_cart")] == [1, 1, None]
    assert of[1, 1, "view"]["buy_time"] == 30
    assert of[1, 1, "cart"]["buy_of_cart"] == 1
    assert of[1, 1, "cart"]["cart"] is None
    assert of[1, 2, "view"]["buy"] == 0
    assert (of[2, 1, "view"]["buy"], of[2, 1, "view"]["buy_time"]) == (1, 950)
    assert [of[2, 3, "view"][task] for task in ("cart", "buy")] == [1, 1]
    assert all(of[1, 1, "buy"][task] is None for task in ("cart", "buy", "buy_of_cart"))
    write_shop(made, tmp_path / "shop")
    dataset = load_dataset(tmp_path / "shop")
    train = dataset.train_impressions
    [row] = np.flatnonzero((dataset.user_ids[train.user_rows - 1] == b"2") & (train.times == 40))
    assert train.labels[row, 1] == 0


def test_the_test_period_begins_at_the_cut_to_the_second(tmp_path):
    rng = np.random.default_rng(3)
    times = np.sort(rng.integers(0, 5000, 700))
    rows = [(n % 40, n, "view", time) for n, time in enumerate(times)]
    rows += [
        (n % 40, n, event, time + 1) for n, time in enumerate(times) if n % 3 for event in ("cart", "buy")
    ]
    made = funnel("small", _log(tmp_path, rows), _FUNNEL, ["view", "cart", "buy"])
    write_shop(made, tmp_path / "shop")
    dataset = load_dataset(tmp_path / "shop")
    views = np.array([time for *_, event, time in rows if event == "view"])
    carts = np.array([time for *_, event, time in rows if event == "cart"])
    cuts = [int(np.ceil(np.quantile(of, 0.9))) for of in (views, carts)]
    assert dataset.test_impressions.times.min() >= min(cuts) > dataset.validation_impressions.times.max()
    known = (~np.isnan(dataset.test_impressions.labels)).sum(0).tolist()
    assert known == [(views >= cuts[0]).sum()] * 2 + [(carts >= cuts[1]).sum()]


@pytest.mark.parametrize(
    ("name", "folder", "counts"),
    [
        (
            "retailrocket",
            "funnel_retailrocket",
            {"cart": (7538, 719), "buy": (7538, 608), "buy_of_cart": (1246, 838)},
        ),
        ("tmall", "funnel_tmall", {"buy_of_cart": (14007, 552), "buy_of_fav": (4949, 463)}),
        ("trivago", "funnel_trivago", {"click": (31331, 1360)}),
    ],
)
def test_the_test_rows_are_those_of_the_protocol(name, folder, counts, tmp_path):
    made = MAKERS[name](real_data(folder))
    write_shop(made, tmp_path / name)
    dataset = load_dataset(tmp_path / name)
    labels = dataset.test_impressions.labels
    tasks = [task.name for task in dataset.schema.tasks]
    found = {
        task: (int((~np.isnan(of)).sum()), int(np.nansum(of)))
        for task, of in zip(tasks, labels.T, strict=True)
    }
    assert found == counts


def test_a_list_of_hotels_keeps_its_order_and_prices(tmp_path):
    folder = tmp_path / "funnel_trivago"
    folder.mkdir()
    head = "user_id,session_id,timestamp,step,action_type,reference,platform,city,device,current_filters,"
    head += "impressions,prices"
    lines = [head]
    for n in range(40):
        at = 1000 + 100 * n
        lines.append(f'u{n % 4},s{n},{at},1,interaction item image,{n % 5},DE,"Bonn, Germany",mobile,,,')
        lines.append(
            f'u{n % 4},s{n},{at + 9},2,clickout item,{n % 3},DE,"Bonn, Germany",mobile,,2|0|1,70|50|60'
        )
        lines.append(f'u{n % 4},s{n},{at + 9},3,search for poi,Cathedral,DE,"Bonn, Germany",mobile,,,')
    with gzip.open(folder / "trivago_val_100k.csv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    main([str(tmp_path), "--out", str(tmp_path / "out"), "--only", "trivago"])
    rows = pq.read_table(tmp_path / "out" / "trivago" / "interactions.parquet").to_pylist()
    shown = [row for row in rows if row["event"] == "shown"]
    assert [(row["item_id"], row["position"], row["price"]) for row in shown[:3]] == [
        ("2", 1, 70), ("0", 2, 50), ("1", 3, 60)
    ]  # fmt: skip
    assert all((row["clicked"] == 1) == (row["item_id"] == str(n // 3 % 3)) for n, row in enumerate(shown))
    assert len(rows) == 40 * (3 + 1 + 1)
    dataset = load_dataset(tmp_path / "out" / "trivago")
    first = dataset.train_impressions
    assert (first.history_ends[:3] - dataset.histories.offsets[first.user_rows[:3]]).tolist() == [1, 1, 1]


def test_a_purchase_never_played_has_no_hours_and_a_tenth_tests(tmp_path):
    main([str(real_data("mo_steam")), "--out", str(tmp_path), "--only", "steam"])
    rows = pq.read_table(tmp_path / "steam" / "interactions.parquet")
    played = rows["played"].to_numpy() == 1
    assert (rows["hours"].is_valid().to_numpy() == played).all()
    assert (len(rows), int(played.sum())) == (128_804, 70_477)
    dataset = load_dataset(tmp_path / "steam")
    assert len(dataset.test_impressions.times) == pytest.approx(12_880, rel=0.02)


def test_a_third_of_the_people_test(tmp_path):
    main([str(real_data("mt_census_kdd")), "--out", str(tmp_path), "--only", "census"])
    dataset = load_dataset(tmp_path / "census")
    assert len(dataset.test_impressions.times) == 33_254
    assert np.nanmean(dataset.test_impressions.labels, 0) == pytest.approx([0.062, 0.4325], abs=0.003)


def test_what_is_missing_or_unknown_is_one_line(tmp_path, capsys):
    for options in (["--only", "steam"], ["--only", "nowhere"]):
        with pytest.raises(SystemExit):
            main([str(tmp_path), "--out", str(tmp_path / "out"), *options])
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "game_purchase.dat is missing; DATA_DIR is the folder that holds mo_steam" in first
    assert second == "error: --only nowhere: unknown; known: retailrocket, tmall, trivago, steam, census"
    assert not (tmp_path / "out").exists()
