"""Chooses a precision for every block of a model, within a budget: what may be lost, how large, or how slow
it may be.

Blocks are ordered by what lowering them costs for what it gains; then the joint result is judged, since
losses do not add up, and the worst go back up until it holds. The same model, feeds and judge give the same
precisions, unless a measured time is what decides. Order and joint check follow HAWQ-V3 (Yao et al. ICML
2021), with the ranking itself as the measure instead of a Hessian.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from builders.compress import graph
from builders.compress.graph import Block
from builders.compress.judge.judge import Judge, Judged, Loss, compare
from builders.compress.judge.timing import time_share
from builders.compress.quantize.calibration import Ranges, check_finite
from builders.compress.quantize.quantize import BITS, PRECISIONS, check_precisions, choices, quantize
from builders.compress.quantize.sensitivity import (
    Sensitivity,
    aligned_products,
    fp16_misfit,
    sensitivities,
    shapes_of,
)
from builders.progress import Progress
from ensemble.arrays import Array
from ensemble.engines.flavors import RTX, TENSORRT
from ensemble.errors import InvalidInput

MIN_OVERLAP = 0.95  # quantization alone has far less noise than NDCG: below it the lists are not the same
TIMED = (1, 8)  # users at once
_FIRST = (0, 1, 2, 3, 4, 6)  # blocks of a large model that stay up, tried in this order
_WORTH = 0.01  # of the time; smaller differences are not told from noise
# of all operations: what is smaller may cost more to convert than it saves, and is timed by itself
_SURELY_FASTER = 0.05


@dataclass(frozen=True)
class Trial:
    """Holds one joint choice of precisions that was tried, and what it costs: a point of the Pareto plot."""

    label: str
    precisions: dict[str, str]
    size: float  # bytes as a share of fp32's
    # time of 8 users as a share of fp32's; None where this machine cannot run the runtime
    latency: float | None
    loss: Loss


@dataclass(frozen=True)
class ChosenPrecisions:
    """Holds which block has which precision, what that does to users, and what else was tried."""

    runtime: str
    precisions: dict[str, str]
    table: list[dict[str, Any]]  # a row a block: what lowering it alone loses, what was chosen and why
    trial: Trial  # what was chosen
    trials: list[Trial]
    latencies: dict[int, float]  # users at once -> time as a share of fp32's
    notes: list[str]
    model: bytes = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Gives all but the model, as data for JSON."""
        shallow = dataclasses.replace(self, model=b"")
        return {name: value for name, value in dataclasses.asdict(shallow).items() if name != "model"}


def choose_precisions(
    model: bytes,
    feeds: Mapping[str, Array],
    judge: Judge,
    *,
    ranges: Ranges,
    runtime: str,
    candidates: tuple[str, ...] = (),
    max_loss: float | None = None,
    target_size: float | None = None,
    target_latency: float | None = None,
    min_overlap: float = MIN_OVERLAP,
    pinned: Mapping[str, str] | None = None,
    flavor: str = TENSORRT,
    progress: Progress | None = None,
) -> ChosenPrecisions:
    """Chooses for one fp32 model, on one runtime, within exactly one budget.

    `ranges` are the model's on `feeds`, as calibrate() gives them. The budget: `max_loss` is the share of
    NDCG@10 that may be lost (0.005 = half a percent) while the lists overlap by `min_overlap`; `target_size`
    is bytes, `target_latency` the time of 8 users, both as a share of fp32's. `candidates` are the
    precisions to choose from, all of the runtime's by default. `flavor` says which TensorRT opens the
    engine: on RTX cards int8 gains bytes only, and fp8 comes before it. InvalidInput, with the best that was
    reached, when the budget cannot be met.
    """
    budget = {"max_loss": max_loss, "target_size": target_size, "target_latency": target_latency}
    given = {name: value for name, value in budget.items() if value is not None}
    if len(given) != 1:
        raise InvalidInput(
            f"precisions are chosen within one budget of {', '.join(budget)}; given: "
            f"{', '.join(given) or 'none'}"
        )
    if target_latency is not None and runtime != "onnxruntime":
        raise InvalidInput(
            f"target_latency cannot be measured for {runtime} on this machine; give max_loss or target_size"
        )
    search = Search(model, feeds, judge, ranges, runtime, candidates, dict(pinned or {}))
    search.weights_only = frozenset({"int8"} if (runtime, flavor) == ("tensorrt", RTX) else ())
    search.measure(progress)
    if max_loss is not None:
        low = search.within_loss(max_loss, min_overlap)
    elif target_size is not None:
        low = search.within_size(target_size)
    else:
        low = search.within_latency(float(target_latency or 0.0))
    return search.finish(low, may_lift=target_size is None)


def choose_whole(
    model: bytes,
    feeds: Mapping[str, Array],
    judge: Judge,
    *,
    ranges: Ranges,
    runtime: str,
    max_loss: float,
    pinned: Mapping[str, str] | None = None,
) -> ChosenPrecisions:
    """Puts every block that is not pinned at int8, all at once, or all but the first few, which see what was
    rounded least (a convolution on pixels, say).

    For large models, whose blocks would take minutes to be judged one by one. Where even that loses more than
    `max_loss`, or the whole is slower than fp32, as on CPUs without VNNI, all stay at fp32, and a note says
    why.
    """
    candidates = ("int8", PRECISIONS[runtime][-1])
    search = Search(model, feeds, judge, ranges, runtime, candidates, dict(pinned or {}))
    free = [block for block in search.blocks if block.name not in search.pinned]
    search.lowest = {block.name: "int8" for block in free if "int8" in choices(block, runtime)}
    names = list(search.lowest)
    for first in _FIRST:
        low = frozenset(names[first:])
        trial = search.trial(low, f"all but the first {first} at int8" if first else "all at int8")
        if trial.latency is not None and trial.latency > 1:
            search.notes.append(f"all blocks stay at fp32: lower ones are slower on {runtime}")
            return search.finish(frozenset(), may_lift=False)
        if trial.loss.relative <= max_loss:
            return search.finish(low, may_lift=False)
        if first < len(names):
            search.reasons[names[first]] = f"lifted: with it the joint loss was {trial.loss.relative:.2%}"
    lost = ", ".join(f"{one.loss.relative:.2%}" for one in search.trials.values())
    search.notes.append(
        f"all blocks stay at fp32: with none and with up to {_FIRST[-1]} of them up, the others lose {lost}"
    )
    return search.finish(frozenset(), may_lift=False)


def global_8bit(
    model: bytes,
    judge: Judge,
    ranges: Ranges,
    *,
    runtime: str,
    feeds: Mapping[str, Array],
    size: float | None = None,
) -> Trial:
    """Puts every block at int8, whatever that loses: what the planner is held against.

    `size`: a share of fp32's bytes; then the largest blocks go down first, until the engine is that small.
    """
    search = Search(model, feeds, judge, ranges, runtime, ("int8", PRECISIONS[runtime][-1]), {})
    order = sorted(
        (b for b in search.blocks if "int8" in choices(b, runtime)), key=lambda b: (-b.bytes, b.name)
    )
    search.lowest = {block.name: "int8" for block in order}
    names = [block.name for block in order]
    count = (
        len(names)
        if size is None
        else search.fewest(names, lambda low: len(search.write(low)) / len(model) <= size)
    )
    return search.trial(frozenset(names[:count]), "global int8")


class Search:
    """Searches the precisions of one model: holds what was measured, and what was tried.

    `low` is always the names of the blocks that are at their lowest precision.
    """

    def __init__(
        self,
        model: bytes,
        feeds: Mapping[str, Array],
        judge: Judge,
        ranges: Ranges,
        runtime: str,
        candidates: tuple[str, ...],
        pinned: dict[str, str],
    ) -> None:
        self.model, self.feeds, self.judge = model, feeds, judge
        self.ranges, self.runtime, self.pinned = ranges, runtime, pinned
        proto = graph.load(model)
        self.blocks: list[Block] = graph.blocks(proto)
        self.aligned = aligned_products(self.blocks, shapes_of(proto), ranges)
        self.candidates = _checked(candidates, runtime)
        check_precisions(self.blocks, pinned, ranges, runtime)
        self.uncompressed: Judged = judge(model)
        self.notes: list[str] = []
        self.weights_only: frozenset[str] = frozenset()  # precisions that save bytes and no operations
        self.highest = {block.name: self._highest(block) for block in self.blocks}
        self.lowest: dict[str, str] = {}
        self.rows: dict[str, Sensitivity] = {}
        self.reasons: dict[str, str] = dict.fromkeys(pinned, "pinned")
        self.trials: dict[frozenset[str], Trial] = {}

    def measure(self, progress: Progress | None) -> None:
        """Judges every block alone at its 8-bit precisions; the better of them is its lowest."""
        eights = tuple(p for p in self.candidates if BITS[p] == 8)
        smaller = eights or tuple(p for p in self.candidates if BITS[p] == 16)
        rows = sensitivities(
            self.model,
            self.feeds,
            self.judge,
            ranges=self.ranges,
            runtime=self.runtime,
            precisions=smaller,
            skip=frozenset(self.pinned),
            uncompressed=self.uncompressed,
            progress=progress,
        )
        for row in map(self._with_operations_saved, rows):
            if row.name not in self.rows or self._is_better(row, self.rows[row.name]):
                self.rows[row.name] = row
        if self.weights_only & set(smaller):
            names = " and ".join(sorted(self.weights_only & set(smaller)))
            self.notes.append(f"{names} saves bytes only: on RTX cards it is of weights; products are fp16's")
        self.lowest = {
            name: row.precision for name, row in self.rows.items() if row.precision != self.highest[name]
        }

    def _with_operations_saved(self, row: Sensitivity) -> Sensitivity:
        """Takes the operations out of a row that saves none: 8 bits of weights only, or of sides that tensor
        cores
        do not take."""
        if BITS[row.precision] > 8 or self.runtime != "tensorrt":
            return row
        fits = row.name in self.aligned and row.precision not in self.weights_only
        return row if fits else dataclasses.replace(row, flops_share=0.0)

    def _is_better(self, row: Sensitivity, than: Sensitivity) -> bool:
        """Says whether a row costs less than another of its block, or saves operations that are worth it."""

        def rank(one: Sensitivity) -> tuple[bool, float]:
            is_fast = one.flops_share > 0 and one.cost <= one.bytes_share + one.flops_share
            return not (is_fast and self.weights_only), one.cost

        return rank(row) < rank(than)

    def within_loss(self, max_loss: float, min_overlap: float) -> frozenset[str]:
        """Puts blocks down that gain more than they cost, then the worst up until the loss is allowed."""
        low = []
        for name in self._by_cost(lambda row: row.bytes_share + row.flops_share):
            row = self.rows[name]
            # A share of the lists is paid for a larger share of bytes and operations.
            if row.cost <= row.bytes_share + row.flops_share:
                low.append(name)
            else:
                self.reasons[name] = (
                    f"costs more ({row.cost:.2%} of the lists) than its bytes and operations are worth"
                )
        while True:
            found = self.trial(frozenset(low), f"{len(low)} of {len(self.blocks)} low").loss
            if found.relative <= max_loss and found.overlap >= min_overlap:
                return frozenset(low)
            if not low:
                raise InvalidInput(
                    f"max_loss {max_loss:.2%} cannot be met on {self.runtime}: with every block up the loss "
                    f"is still {found.relative:.2%} and the "
                    f"overlap {found.overlap:.1%} (wanted {min_overlap:.1%}); allow more or unpin "
                    f"{', '.join(self.pinned) or 'a candidate'}"
                )
            lifted = low.pop()
            self.reasons[lifted] = (
                f"lifted: with it the joint loss was {found.relative:.2%}, the overlap {found.overlap:.1%}"
            )

    def within_size(self, target: float) -> frozenset[str]:
        """Puts the cheapest blocks for their bytes down, until the file is small enough."""
        order = [name for name in self._by_cost(lambda row: row.bytes_share) if self.rows[name].parameters]
        best = len(self.write(order)) / len(self.model)
        if best > target:
            raise InvalidInput(
                f"target_size {target:.1%} of fp32 cannot be met on {self.runtime}: the smallest is "
                f"{best:.1%}; prune or distil first"
            )
        low = order[: self.fewest(order, lambda low: len(self.write(low)) / len(self.model) <= target)]
        # A large last block may have made others needless.
        for name in sorted(low, key=lambda name: (-self.rows[name].cost, name)):
            rest = [other for other in low if other != name]
            low = rest if len(self.write(rest)) / len(self.model) <= target else low
        return frozenset(low)

    def within_latency(self, target: float) -> frozenset[str]:
        """Puts the cheapest blocks for their operations down, until 8 users are fast enough."""
        order = [name for name in self._by_cost(lambda row: row.flops_share) if self.rows[name].flops_share]
        best = self._time(self.write(order))
        if best > target:
            raise InvalidInput(
                f"target_latency {target:.1%} of fp32 cannot be met on {self.runtime}: the fastest takes "
                f"{best:.1%}; prune or distil first"
            )
        return frozenset(order[: self.fewest(order, lambda low: self._time(self.write(low)) <= target)])

    def fewest(self, order: list[str], holds: Callable[[list[str]], bool]) -> int:
        """Finds by halving the fewest first names for which `holds`; all of them where none does."""
        least, most = 0, len(order)
        while least < most:
            middle = (least + most) // 2
            least, most = (least, middle) if holds(order[:middle]) else (middle + 1, most)
        return most

    def finish(self, low: frozenset[str], may_lift: bool) -> ChosenPrecisions:
        """Checks the chosen engine's speed, and puts it all into one result."""
        if self.runtime == "onnxruntime" and may_lift:
            low = self._without_slower(low)
        trial = self.trial(low, "planner")
        model = self.write(low)
        if self.runtime == "tensorrt":
            check_finite(model, self.feeds)
        latencies = (
            {batch: time_share(model, self.model, self.feeds, batch)[0] for batch in TIMED}
            if self.runtime == "onnxruntime"
            else {}
        )
        return ChosenPrecisions(
            self.runtime,
            trial.precisions,
            self._table(trial),
            trial,
            list(self.trials.values()),
            latencies,
            self.notes,
            model,
        )

    def trial(self, low: frozenset[str], label: str) -> Trial:
        """Writes, times and judges one joint choice, once."""
        if low not in self.trials:
            model = self.write(low)
            latency = self._time(model) if self.runtime == "onnxruntime" else None
            loss = compare(self.uncompressed, self.judge(model))
            self.trials[low] = Trial(
                label, self._precisions(low), len(model) / len(self.model), latency, loss
            )
        return dataclasses.replace(self.trials[low], label=label)

    def write(self, low: frozenset[str] | list[str]) -> bytes:
        """Writes the model with these blocks low and all others high."""
        return quantize(self.model, self._precisions(low), self.ranges, self.runtime)

    def _without_slower(self, low: frozenset[str]) -> frozenset[str]:
        """Lifts blocks without which the engine is faster; all, where the whole is slower than fp32."""
        small = [name for name in low if self.rows[name].flops_share < _SURELY_FASTER]
        for name in sorted(small, key=lambda name: (self.rows[name].flops_share, name)):
            rest = low - {name}
            share, error = time_share(self.write(rest), self.write(low), self.feeds, TIMED[-1], rounds=9)
            if share < 1 - max(_WORTH, 2 * error):
                low = rest
                self.reasons[name] = (
                    f"slower at {self.lowest[name]} on {self.runtime}: without it the engine takes "
                    f"{share:.0%} of the time"
                )
        if low and self._time(self.write(low)) > 1:
            self.notes.append(f"all blocks stay at fp32: lower ones are slower on {self.runtime}")
            return frozenset()
        return low

    def _time(self, model: bytes) -> float:
        return time_share(model, self.model, self.feeds, TIMED[-1])[0]

    def _by_cost(self, gain: Callable[[Sensitivity], float]) -> list[str]:
        """Names the blocks that can go down, those of the least cost for the gain first."""
        rows = [self.rows[name] for name in self.lowest]
        return [row.name for row in sorted(rows, key=lambda row: (row.cost / max(gain(row), 1e-9), row.name))]

    def _precisions(self, low: frozenset[str] | list[str]) -> dict[str, str]:
        return {
            b.name: self.pinned.get(b.name) or (self.lowest if b.name in low else self.highest)[b.name]
            for b in self.blocks
        }

    def _highest(self, block: Block) -> str:
        """Gives fp16 where the runtime has it and it holds the block's numbers, else fp32."""
        if "fp16" not in self.candidates:
            return "fp32"
        if why := fp16_misfit(self.model, block, self.ranges, self.runtime):
            self.notes.append(why)
            return "fp32"
        return "fp16"

    def _table(self, trial: Trial) -> list[dict[str, Any]]:
        """Lists for each block what was measured, the chosen precision, and why it is not the lowest."""
        table = []
        for block in self.blocks:
            row, chosen = self.rows.get(block.name), trial.precisions[block.name]
            known = {"name": block.name, "op": block.op, "parameters": block.parameters}
            facts = dataclasses.asdict(row) if row else known
            reason = "" if self.lowest.get(block.name) == chosen else self._reason(block.name)
            facts |= {"tried": facts.pop("precision", None), "chosen": chosen, "reason": reason}
            table.append(facts)
        return table

    def _reason(self, name: str) -> str:
        """Says why a block is not at its lowest precision."""
        unneeded = "not needed for the budget" if name in self.lowest else "cannot be lower"
        return self.reasons.get(name, unneeded)


def _checked(candidates: tuple[str, ...], runtime: str) -> tuple[str, ...]:
    """Gives the candidates, all of the runtime's by default; InvalidInput for one it does not have."""
    if runtime not in PRECISIONS:
        raise InvalidInput(f"runtime {runtime} is unknown; known: {', '.join(PRECISIONS)}")
    unknown = [precision for precision in candidates if precision not in PRECISIONS[runtime]]
    if unknown:
        raise InvalidInput(
            f"candidates has {', '.join(unknown)}; {runtime} knows {', '.join(PRECISIONS[runtime])}"
        )
    return candidates or PRECISIONS[runtime]
