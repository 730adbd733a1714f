"""Tunes a shop: makes its past, searches, and writes what was found as a preset, a plot and a report."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from builders.content.sources import encoder_digests
from builders.data.dataset import open_dataset
from builders.encoders import stage as encoders
from builders.folders import only_one
from builders.index import stage as index
from builders.keys import FileDigests, shop_digest
from builders.presets import Preset
from builders.settings import preset_text
from builders.shop.catalogue import write_changes
from builders.stages import Stage, Stages
from builders.tune import past
from builders.tune.plot import plot_of
from builders.tune.search import Search, num_ended, open_study
from builders.tune.space import as_json, space_of, starting_point
from builders.tune.worker import ENCODERS, RANKER, Work
from ensemble.bootstrap import paired_difference
from ensemble.errors import InvalidInput
from ensemble.json_text import json_text
from ensemble.progress import bar
from ensemble.release.files import write_durably

STUDY, PRESET_FILE, PLOT, REPORT = "study.json", "tuned.toml", "tune.png", "tune.json"
_INNER = "work"
# resamples that may see the best below the preset, over all trials: the best of many is soon so by chance
_DOUBT, _SAMPLES = 0.05, 10_000


@dataclass(frozen=True)
class TuneOptions:
    """Holds what `peregrine tune` was asked for."""

    shop: Path
    out: Path
    preset: Preset
    catalogue: Path  # of the catalogue's log
    trials: int = 20
    minutes: float = 60.0
    jobs: int = 1
    seed: int = 0
    only: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()  # settings that --set gave


def tune(options: TuneOptions, console: Console) -> dict[str, Any]:
    """Runs a study, or goes on with the one that lies in `out`; gives its report.

    KeyboardInterrupt, which ends the search, is told by the report's "stopped".
    """
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    lock = options.out / ".lock"
    with only_one(lock, lambda: console.print(f"another tune is at work in {options.out}; waiting")):
        return _tuned(options, console, began + 60 * options.minutes)


def _tuned(options: TuneOptions, console: Console, deadline: float) -> dict[str, Any]:
    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    inner = options.out / _INNER
    torch.set_num_threads(options.preset.threads or torch.get_num_threads())
    stages, facts = _given(options, inner, console)
    data = stages.run(Stage("data", past.run, options.preset.sizes, ("shop", "catalogue"))).folder
    dataset = open_dataset(data)
    has_labels = dataset.train_impressions is not None
    space = space_of(options.preset, has_labels=has_labels, only=options.only, fixed=options.fixed)
    start = starting_point(options.preset, space)
    _same_study(options, {"shop": facts, "space": as_json(space)})
    ready = {"data": data} | ({} if _tunes_encoders(space) else _encoded(stages, options))
    cores = len(os.sched_getaffinity(0))
    work = Work(
        inner, ready, options.preset, options.seed,
        max(1, min(options.preset.threads or cores, cores // options.jobs)),
        ENCODERS if _tunes_encoders(space) and not has_labels else RANKER,
    )  # fmt: skip
    study = open_study(options.out, options.seed, start)
    if before := num_ended(study):
        say(f"{options.out} has {before} trials: going on")
    try:
        with bar("tune", console) as update:
            search = Search(study, space, start, work, options.trials, say, update)
            stopped = search.run(options.jobs, deadline)
    except KeyboardInterrupt:
        stopped = "interrupt"
    finally:
        for left in inner.glob("trial-*"):
            shutil.rmtree(left, ignore_errors=True)
    with _undisturbed():
        return _written(options, study, stopped)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Lets no Ctrl-C stop what takes a second and is what the study was for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _given(options: TuneOptions, inner: Path, console: Console) -> tuple[Stages, Any]:
    """Opens the folder of the stages that trials share, with the shop; gives its digest too."""
    inner.mkdir(exist_ok=True)
    digests, stages = FileDigests(inner / "digests.json", rehash=False), Stages(inner, console)
    facts = [*shop_digest(options.shop, digests), *encoder_digests(options.shop)]
    digests.save()
    stages.give("shop", options.shop, facts)
    _, file, digest = write_changes(options.catalogue, inner)
    stages.give("catalogue", file, digest)
    return stages, stages.given["shop"][0]


def _encoded(stages: Stages, options: TuneOptions) -> dict[str, Path]:
    """Runs once what is the same in all trials, where only the ranker is tuned."""
    training = encoders.Options(options.preset.encoders, None, options.seed)
    indexing = index.Options(options.seed, None)
    done = [
        stages.run(Stage("encoders", encoders.run, training, ("data",))),
        stages.run(Stage("index", index.run, indexing, ("data", "encoders"))),
    ]
    return {one.name: one.folder for one in done}


def _tunes_encoders(space: dict[str, Any]) -> bool:
    return any(name.startswith("encoders.") for name in space)


def _same_study(options: TuneOptions, facts: dict[str, Any]) -> None:
    """Writes what a study is of, or raises InvalidInput where the folder's is of something else."""
    file = options.out / STUDY
    preset = preset_text(options.preset.root, options.preset.changes)
    wanted = json.loads(json_text({**facts, "preset": preset, "seed": options.seed}))
    if not file.exists():
        write_durably(file, json_text(wanted, indent=1))
        return
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        raise InvalidInput(f"{file} cannot be read", "name another --out") from None
    for name, value in wanted.items():
        if known.get(name) != value:
            raise InvalidInput(
                f"{options.out} holds a study of another {name}: its trials do not compare",
                "name another --out, or remove the folder to begin anew",
            )


def _written(options: TuneOptions, study: Any, stopped: str) -> dict[str, Any]:
    """Writes the preset file, the plot and the report of all trials so far; gives the report."""
    trials = [_trial_report(trial) for trial in study.get_trials(deepcopy=False)]
    report: dict[str, Any] = {"study": str(options.out), "stopped": stopped, "trials": trials}
    done = [one for one in trials if one["value"] is not None]
    if not done:
        return report
    first = next(one for one in done if one["start"])
    best = max(done, key=lambda one: one["value"])  # of equals the first: the preset, if it is one
    gain = _gain(options.out / _INNER, first, best)
    is_sure = best is not first and gain["p_worse"] < _DOUBT / len(done)
    changes = {**options.preset.changes, **(best["changes"] if is_sure else {})}
    report |= {
        "figure": best["figure"],
        "measure": best["measure"],
        "start": {"preset": options.preset.name, "value": first["value"]},
        "best": {
            "trial": best["trial"],
            "value": best["value"],
            "settings": best["changes"],
            "is_sure": is_sure,
        },
        "gain": gain,
        "preset": str(options.out / PRESET_FILE),
        "plot": str(options.out / PLOT),
    }
    of = f"trial {best['trial']} of {len(trials)}"
    head = f"# found by `peregrine tune`, the best is {of}: {gain_line(report)}\n"
    write_durably(options.out / PRESET_FILE, head + preset_text(options.preset.root, changes))
    write_durably(options.out / PLOT, plot_of(report))
    write_durably(options.out / REPORT, json_text(report, indent=1))
    return report


def _trial_report(trial: Any) -> dict[str, Any]:
    """Gives what is known of a trial as JSON-able data."""
    of = trial.user_attrs
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "start": bool(of.get("start")),
        "value": trial.value if trial.state.name == "COMPLETE" else None,
        "changes": of.get("changes", {}),
        "seconds": of.get("seconds"),
        "epochs": {str(epoch): value for epoch, value in trial.intermediate_values.items()},
        **{name: of.get(name, "") for name in ("figure", "measure", "rows", "why_not")},
    }


def _gain(folder: Path, first: dict[str, Any], best: dict[str, Any]) -> dict[str, float]:
    """Compares the best trial with the start, row by row: mean, 95% interval over users, and the share of
    resamples that see it worse."""
    (users, before), (_, after) = (np.load(folder / one["rows"]) for one in (first, best))
    return asdict(paired_difference(before, after, users.astype(np.int64), samples=_SAMPLES))


def gain_line(report: dict[str, Any]) -> str:
    """Says in a line what was gained against the preset that the search began from."""
    start, best, gain = report["start"], report["best"], report["gain"]
    what = "worth" if report["figure"] == "worth" else "NDCG@10"
    if not best["settings"]:
        return f"{what} {start['value']:.5f}: nothing tried was better than preset {start['preset']}"
    share = f" ({gain['mean'] / start['value']:+.1%})" if start["value"] else ""
    kept = "" if best["is_sure"] else f": not surely better, so preset {start['preset']} is kept"
    return (
        f"{what} {start['value']:.5f} of preset {start['preset']} -> {best['value']:.5f}{share}, difference "
        f"{gain['low']:+.5f} to {gain['high']:+.5f}, on the validation part that chose it{kept}"
    )
