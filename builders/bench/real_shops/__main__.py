"""Turns public data sets into shops that `peregrine build` takes, split as their protocols say.

    python -m builders.bench.real_shops DATA_DIR --out DIR [--only retailrocket,tmall,trivago,steam,census]

DATA_DIR holds the folders funnel_retailrocket, funnel_tmall, funnel_trivago, mo_steam and mt_census_kdd. Each
becomes DIR/<name>: interactions.parquet, the tables of items and users that there are, and shop.toml. They
are research data: to measure with, never to ship.

What shop.toml cannot say is said in the shop's own terms:
  - **Two kinds of exposure in one shop** (buy given view, buy given cart). `impression` names one event, so
    these shops name none: each row may be an exposure, and each task has a column that is empty in the rows
    that are no exposure of it, and one that says when its label came in. So a build knows no label before
    its time, and none of a later part of the split: the rows just before a cut have had little time to be
    bought, as those before the log's end have, and validation looks like the test.
  - **A cut at a given moment**: `test` is the share of rows behind it. The protocols cut each task's rows at
    their own 90% quantile. A shop has one cut, the earliest of them; rows between it and their own cut have
    no label. So the test rows are the protocols', and a few training rows are lost.
  - **A split without a clock** (steam by a hash, census by a permutation): `time` is the place in that order.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from builders.bench.real_shops.clockless import census, steam
from builders.bench.real_shops.funnels import retailrocket, tmall
from builders.bench.real_shops.hotels import trivago
from builders.bench.real_shops.made import Made
from builders.folders import new_folder
from builders.shop.read import read_shop
from builders.shop.shop_toml import SHOP_FILE
from ensemble.errors import InvalidInput, PeregrineError

MAKERS: dict[str, Callable[[Path], Made]] = {
    maker.__name__: maker for maker in (retailrocket, tmall, trivago, steam, census)
}


def write_shop(made: Made, out: Path) -> None:
    """Writes the shop's folder, whole or not at all, and reads it as a build will."""
    with new_folder(out, force=True) as folder:
        pq.write_table(made.interactions, folder / "interactions.parquet")
        for name, table in made.others.items():
            pq.write_table(table, folder / f"{name}.parquet")
        (folder / SHOP_FILE).write_text(made.toml, "utf-8")
        read_shop(folder)


def main(arguments: list[str] | None = None) -> None:
    """Writes the shops that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shops")
    parser.add_argument("--only", default=",".join(MAKERS), help="names, separated by commas")
    given = parser.parse_args(arguments)
    try:
        for name in given.only.split(","):
            if name not in MAKERS:
                raise InvalidInput(f"--only {name}: unknown; known: {', '.join(MAKERS)}")
            made = MAKERS[name](given.source)
            write_shop(made, given.out / name)
            print(f"{given.out / name}: {made.interactions.num_rows:,} interactions")
    except PeregrineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
