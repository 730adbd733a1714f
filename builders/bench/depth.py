"""Measures what lists are worth, and cost, over how many candidates the ranker sees: a table and a plot.

    python -m builders.bench.depth r1 -r REPOSITORY [--depths 32 64 256 …] [--gathered 512] [--power 0]
        [--plot FILE.png] [--json]

Asks the verified model that the release's build has kept, as it is; nothing is trained but the coarse ranker.
Two ways of giving the ranker n candidates stand beside each other:

  - recall: recall gathers n, as it would if the release had been built for n;
  - coarse (with --gathered G): recall gathers G, of which a coarse ranker (coarse.py), distilled on users of
    the validation part, leaves n.

Worth is that of ten by a generated shop's planted truth; any shop has NDCG@10 of the next item. Differences
are from the release's own depth, with 95% intervals of a paired bootstrap over users. Times are milliseconds
of CPU a user, one thread, 8 users at a time, the least of four rounds: recall, the ranker, the coarse ranker,
and `all` with users' rows and encoder. A coarse row adds up parts that were timed alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from builders import metrics
from builders.bench.coarse import Coarse, Gathered, distil, gather, known_of
from builders.data.dataset import Targets
from builders.evaluate.kept import STAGES, Kept, open_kept
from builders.export.verifier import Verifier
from builders.report.figures import BLUE, ORANGE, axes_of, png
from builders.shop.truth import FILE
from builders.verify.by_truth import asked_targets, planted, values_of
from builders.verify.values import PLACES, sampled
from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTHS = (16, 32, 64, 128, 256, 512, 1024)
_TIMED, _AT_ONCE, _ROUNDS = 128, 8, 4  # users whose asking is timed, users at a time, rounds
_TEACHERS = 2000  # users whom the coarse ranker learns from


@dataclass(frozen=True)
class Cost:
    """Holds milliseconds of CPU a user."""

    recall: float
    ranker: float
    rest: float
    coarse: float = 0.0

    def row(self) -> dict[str, float]:
        """Gives the parts and their sum, as the table has them."""
        parts = {"recall": self.recall, "coarse": self.coarse, "ranker": self.ranker}
        return {f"ms_{name}": value for name, value in parts.items()} | {
            "ms_all": self.recall + self.coarse + self.ranker + self.rest
        }


class Depths:
    """Asks one release's verified model at one depth after another."""

    def __init__(self, kept: Kept, repository: Path, power: float | None = None) -> None:
        """`power` stands in for the blend's own; the tasks then count, whatever the build has chosen."""
        self.dataset, self.verifier = kept.dataset, Verifier(kept.dataset, kept.staged)
        self.truth = repository / kept.manifest[STAGES]["data"] / FILE
        self.sizes, self.settings = self.verifier.recall.sizes, self.verifier.recall.settings
        if power is not None:
            blend = self.verifier.reranking.blended
            self.verifier.reranking.blended = replace(blend, power=power, uses_tasks=True)
        self.features = np.asarray(self.verifier.features.item_reader.table["features"])

    def gathers(self, depth: int) -> None:
        """Has recall gather `depth` items, each source its usual share."""
        share = depth / self.sizes.candidates
        quotas = {name: int(quota * share) for name, quota in self.settings.quotas.items()}
        self.verifier.recall.sizes = replace(self.sizes, candidates=depth)
        self.verifier.recall.settings = replace(self.settings, quotas=quotas)

    def asked(self, depth: int, targets: Targets) -> Gathered:
        """Asks about targets at a depth."""
        self.gathers(depth)
        return gather(self.verifier, targets)

    def coarse(self, depth: int) -> Coarse:
        """Distils a coarse ranker of `depth` items on validation users; InvalidInput if there are none."""
        held_out = self.dataset.validation
        chosen = sampled(len(held_out.user_rows), _TEACHERS)
        if not len(chosen):
            raise InvalidInput("--gathered: no user is held out for validation", "leave it out")
        return distil(
            self.asked(depth, Targets(*(of[chosen] for of in vars(held_out).values()))), self.features
        )

    def cost(self, depth: int, targets: Targets, coarse: Coarse | None = None) -> Cost:
        """Times the chain at a depth, the least of some rounds; of `coarse`, too, where it is given."""
        self.gathers(depth)
        rounds = [self._round(targets, coarse) for _ in range(_ROUNDS)]
        return Cost(*(1e3 * float(least) for least in np.min(rounds, axis=0)))

    def _round(self, targets: Targets, coarse: Coarse | None) -> tuple[float, float, float, float]:
        """Gives CPU seconds a user of recall, the ranker, the rest and the coarse ranker."""
        verifier, spent = self.verifier, {"recall": 0.0, "ranker": 0.0}
        steps = {name: getattr(verifier, name).run for name in spent}
        for name, run in steps.items():
            getattr(verifier, name).run = _timed(run, name, spent)
        whole = judged = 0.0
        count = min(_TIMED, len(targets.user_rows))
        try:
            for start in range(0, count, _AT_ONCE):
                piece = slice(start, min(start + _AT_ONCE, count))
                began = time.process_time()
                one = verifier.scored(targets.user_rows[piece], targets.history_ends[piece])
                whole += time.process_time() - began
                if coarse is not None:
                    found = one.found
                    began = time.process_time()
                    scores = coarse.scores(
                        known_of(one), found["candidate_features"], found["candidate_scores"]
                    )
                    np.argpartition(-scores, min(PLACES, scores.shape[1] - 1), axis=1)
                    judged += time.process_time() - began
        finally:
            for name in steps:
                del getattr(verifier, name).run
        rest = whole - spent["recall"] - spent["ranker"]
        return spent["recall"] / count, spent["ranker"] / count, rest / count, judged / count


def _timed(run: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """Wraps a step's `run` so that its CPU seconds are added up in `spent`."""

    def timed(*arguments: Any, **tensors: Any) -> Any:
        began = time.process_time()
        found = run(*arguments, **tensors)
        spent[name] += time.process_time() - began
        return found

    return timed


def measure(
    kept: Kept,
    repository: Path,
    depths: Sequence[int] = DEPTHS,
    gathered: int | None = None,
    power: float | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Gives the report: what was asked, what could be had, and a row a way and depth."""
    _refuse_wrong(min(depths), gathered, power)
    of = Depths(kept, repository, power)
    targets = asked_targets(of.dataset)
    if not len(targets.user_rows):
        raise InvalidInput(f"release {kept.name}: nothing was held out", "name a release of another split")
    own, items = of.sizes.candidates, of.dataset.num_items
    wanted = sorted({min(depth, items) for depth in (*depths, own)})
    rows, lists = list[dict[str, Any]](), dict[str, Array]()
    costs = dict[int, Cost]()
    for depth in wanted:
        progress(f"{depth} candidates")
        lists[f"recall {depth}"] = _shown(of.asked(depth, targets))
        costs[depth] = of.cost(depth, targets)
        rows.append({"way": "recall", "gathered": depth, "ranked": depth, **costs[depth].row()})
    if gathered is not None:
        deep = min(gathered, items)
        progress(f"a coarse ranker of {deep}")
        coarse, asked = of.coarse(deep), of.asked(deep, targets)
        cost = of.cost(deep, targets, coarse)
        for depth in (depth for depth in wanted if depth < deep):
            lists[f"coarse {depth}"] = _shown(coarse.leaves(asked, of.features, depth))
            mine = replace(cost, ranker=costs[depth].ranker).row()
            rows.append({"way": "coarse", "gathered": deep, "ranked": depth, **mine})
    report = {"release": kept.name, "users": len(targets.user_rows), "items": items, "candidates": own}
    report["power"] = of.verifier.reranking.blended.power
    return report | _figures(of, targets, rows, lists)


def _refuse_wrong(least: int, gathered: int | None, power: float | None) -> None:
    """Raises InvalidInput for what cannot be asked."""
    if least < PLACES:
        raise InvalidInput(f"--depths {least}: should be at least {PLACES}, which a list shows")
    if gathered is not None and gathered <= least:
        raise InvalidInput(f"--gathered {gathered}: should be more than {least}, the least of --depths")
    if power is not None and not 0 <= power < np.inf:
        raise InvalidInput(f"--power {power:g}: should be at least 0")


def _shown(of: Gathered) -> Array:
    """Gives the first ten [Q, 10] of each list, -1 where there are fewer."""
    order = np.lexsort((of.rows, -of.blended), axis=-1)[:, :PLACES]
    there = np.isfinite(np.take_along_axis(of.blended, order, axis=1))
    return np.where(there, np.take_along_axis(of.rows, order, axis=1), -1)


def _figures(
    of: Depths, targets: Targets, rows: list[dict[str, Any]], lists: Mapping[str, Array]
) -> dict[str, Any]:
    """Gives the rows with what their lists are worth, and what could be had at best."""
    worth, best = _worth(of, targets, lists)
    own, done = f"recall {min(of.sizes.candidates, of.dataset.num_items)}", list[dict[str, Any]]()
    for row in rows:
        name = f"{row['way']} {row['ranked']}"
        ranks = metrics.ranks_from_lists(lists[name], targets.item_rows)
        figures: dict[str, Any] = {"ndcg@10": float(metrics.gains(ranks, PLACES).mean())}
        if worth:
            difference = paired_difference(worth[own], worth[name], targets.user_rows)
            figures |= {"worth": float(worth[name].mean()), "worth_minus_own": vars(difference)}
        done.append({**row, **figures})
    return {**best, "rows": done}


def _worth(
    of: Depths, targets: Targets, lists: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, float]]:
    """Gives what an item of each list [Q, 10] is worth by the planted truth [Q], and the best possible and
    knowable means; nothing where the shop was not generated."""
    truth = planted(of.dataset, of.truth) if of.truth.is_file() else "it was not generated"
    if isinstance(truth, str):
        return {}, {}
    parts = []
    for start in range(0, len(targets.user_rows), 64):
        piece = slice(start, start + 64)
        users, ends = targets.user_rows[piece], targets.history_ends[piece]
        times = of.dataset.histories.times[ends]
        some = {name: rows[piece] for name, rows in lists.items()}
        parts.append(values_of(truth, users, times, of.verifier.had(users, ends), some))
    found = {name: np.concatenate([part[name][:, 0] for part in parts]) for name in parts[0]}
    best = {name: float(found.pop(name).mean()) for name in ("best", "knowable", "random")}
    return found, best


def table_of(report: Mapping[str, Any]) -> str:
    """Writes the rows as a Markdown table."""
    lines = [
        "| way | gathers | ranked | worth | minus own depth | NDCG@10 | ms: recall | coarse | ranker | all |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        worth, minus = "-", "-"
        if "worth" in row:
            of = row["worth_minus_own"]
            worth, minus = f"{row['worth']:.4f}", f"{of['mean']:+.4f} [{of['low']:+.4f}, {of['high']:+.4f}]"
        cells = [row["way"], row["gathered"], row["ranked"], worth, minus, f"{row['ndcg@10']:.4f}"]
        cells += [f"{row[f'ms_{name}']:.2f}" for name in ("recall", "coarse", "ranker", "all")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if "best" in report:
        lines += [
            "",
            f"Best possible {report['best']:.4f}, best that could be known {report['knowable']:.4f}.",
        ]
    return "\n".join(lines)


def plot_of(report: Mapping[str, Any]) -> bytes:
    """Draws the figure over how many the ranker sees, and over what a list costs, as a PNG."""
    name = "worth" if "worth" in report["rows"][0] else "ndcg@10"
    there = {row["way"] for row in report["rows"]}
    colours = {way: colour for way, colour in (("recall", BLUE), ("coarse", ORANGE)) if way in there}

    def draw() -> Figure:
        figure, [over, cost] = axes_of(9, 3.4, 2)
        for way, colour in colours.items():
            rows = [row for row in report["rows"] if row["way"] == way]
            for axes, x in ((over, "ranked"), (cost, "ms_all")):
                points = [[row[of] for row in rows] for of in (x, name)]
                axes.plot(*points, "o-", color=colour, markersize=4)
            place = (-4, 5) if way == "recall" else (4, -10)  # the two lines' numbers lie apart
            for row in rows:
                spot = row["ms_all"], row[name]
                cost.annotate(
                    row["ranked"], spot, place, textcoords="offset points", color=colour, fontsize=7
                )
        over.set(title="Over candidates", xlabel="candidates that the ranker sees", xscale="log")
        depths = sorted({row["ranked"] for row in report["rows"]})
        over.set_xticks(depths, map(str, depths))
        over.minorticks_off()
        over.set_ylabel(name)
        cost.set(title="Over cost", xlabel="milliseconds of CPU a user", xscale="log")
        cost.xaxis.set_major_formatter("{x:g}")
        cost.xaxis.set_minor_formatter("{x:g}")
        labels = {"recall": "recall alone", "coarse": "a coarse ranker cuts"}
        over.legend([labels[way] for way in colours], frameon=False, fontsize=8)
        return figure

    return png(draw)


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints a table or JSON."""
    parser = argparse.ArgumentParser(prog="builders.bench.depth", description=__doc__.split("\n")[0])
    parser.add_argument("release")
    parser.add_argument("-r", "--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--gathered", type=int, help="what recall gathers for a coarse ranker")
    parser.add_argument("--power", type=float, help="of recall's relevance, instead of the release's own")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    try:
        if asked.plot is not None and not asked.plot.parent.is_dir():
            raise InvalidInput(f"--plot {asked.plot}: {asked.plot.parent} is no folder", "make it first")
        kept = open_kept(asked.repository, asked.release)
        report = measure(
            kept,
            asked.repository,
            asked.depths,
            asked.gathered,
            asked.power,
            lambda text: print(text, file=sys.stderr, flush=True),
        )
        if asked.plot is not None:
            asked.plot.write_bytes(plot_of(report))
    except PeregrineError as error:
        sys.exit(f"error: {error}")
    print(json_text(report, indent=1) if asked.json else table_of(report))


if __name__ == "__main__":
    main()
