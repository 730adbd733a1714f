"""A study is stopped and gone on with, by the command line, on a real shop; trials that do worse are given
up."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reading import wait_until
from rich.console import Console
from shops import ROOT

from builders.presets import PRESETS
from builders.settings import named_preset
from builders.tune.search import Search, _Running, give_up_running, num_ended, open_study
from builders.tune.tune import TuneOptions, _written, gain_line, tune
from builders.tune.worker import RANKER, Epoch, Work
from ensemble.errors import InvalidInput

CLI = [sys.executable, "-c", "import peregrine; peregrine.main()", "tune"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def shop(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Users who take runs of items, so that there is something to learn in an epoch."""
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "shop.toml").write_text('name = "runs"\n[interactions]\nfile = "log.csv"\n')
    rows = [
        f"u{user},i{(start + step) % 60},{1_700_000_000 + 60 * step}"
        for user, start in enumerate(rng.integers(0, 60, 240).tolist())
        for step in range(8)
    ]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,time", *rows, ""]))
    return folder


def tuned(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *arguments], capture_output=True, text=True, check=False, env=environment(), timeout=200
    )


@pytest.mark.long  # trains for half a minute, and is stopped on the way
def test_a_stopped_study_has_its_best_and_the_same_command_goes_on(shop: Path, tmp_path: Path):
    out = tmp_path / "study"
    asked = [
        str(shop), "--preset", "tiny", "--over", "ranker", "--set", "ranker.list_epochs=1",
        "--set", "encoders.epochs=1", "--out", str(out), "--repository", str(tmp_path),
    ]  # fmt: skip
    first = subprocess.Popen(
        [*CLI, *asked, "--trials", "90"], stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert first.stderr is not None
    said = ""
    for line in first.stderr:
        said += line
        if line.startswith("trial 0: "):  # some of the 90 are still to come
            first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130, said
    assert "stopped by interrupt: the same command goes on" in said
    assert named_preset(str(out / "tuned.toml")).changes["ranker.list_epochs"] == 1
    assert not list((out / "work").glob("trial-*")), "what was at work is swept"

    begun = json.loads((out / "tune.json").read_text())["trials"]
    ended = sum(one["state"] in ("complete", "pruned") for one in begun)
    second = tuned(*asked, "--json", "--trials", str(max(2, ended + 1)))
    assert second.returncode == 0, second.stderr
    assert f"has {ended} trials: going on" in second.stderr
    report = json.loads(second.stdout, parse_constant=pytest.fail)
    values = [one["value"] for one in report["trials"] if one["value"] is not None]
    assert report["stopped"] == "trials"
    assert len(values) >= 2
    assert min(values) > 0
    assert report["best"]["value"] == max(values)
    assert report["start"]["value"] == values[0]
    assert report["gain"]["mean"] == pytest.approx(max(values) - values[0])
    assert (out / "tune.png").read_bytes().startswith(b"\x89PNG")
    found = named_preset(str(out / "tuned.toml"))
    assert {**found.changes} == {
        "ranker.list_epochs": 1,
        "encoders.epochs": 1,
        **(report["best"]["settings"] if report["best"]["is_sure"] else {}),
    }
    tried = next(one["changes"] for one in report["trials"] if one["value"] is not None and one["changes"])
    assert {name.partition(".")[0] for name in tried} == {"ranker"}

    preset = named_preset("tiny", ["ranker.list_epochs=1", "encoders.epochs=1"])
    other = TuneOptions(shop, out, preset, tmp_path, seed=7, only=("ranker",), fixed=tuple(preset.changes))
    with pytest.raises(InvalidInput, match="holds a study of another seed: its trials do not compare"):
        tune(other, Console(quiet=True))


@pytest.mark.parametrize(("gains", "is_sure"), [(0.02, True), (0.0001, False)])
def test_the_preset_is_kept_unless_the_best_is_surely_better(tmp_path: Path, rng, gains, is_sure):
    """Twenty trials whose rows differ by chance from the preset's; one gains as much besides."""
    (tmp_path / "work").mkdir()
    study, before = open_study(tmp_path, 0, {"ranker.row_decay": 0.01}), rng.random(300)
    for number in range(20):
        trial = study.ask()
        trial.suggest_float("ranker.row_decay", 0, 1)
        after = before if number == 0 else before + rng.normal(gains * (number == 7), 0.02, 300)
        np.save(tmp_path / "work" / f"{number}.npy", np.stack([np.arange(300.0), after]))
        facts = {"rows": f"{number}.npy", "changes": {"ranker.row_decay": 0.5} if number else {}}
        for name, fact in {**facts, "start": number == 0, "figure": "ndcg@10", "measure": ""}.items():
            trial.set_user_attr(name, fact)
        study.tell(trial, float(after.mean()))
    options = TuneOptions(tmp_path, tmp_path, PRESETS["tiny"], tmp_path)
    report = _written(options, study, "trials")
    assert report["best"]["is_sure"] is is_sure
    assert report["best"]["value"] > report["start"]["value"]
    assert ("not surely better, so preset tiny is kept" in gain_line(report)) is not is_sure
    kept = named_preset(str(tmp_path / "tuned.toml")).changes
    assert dict(kept) == ({"ranker.row_decay": 0.5} if is_sure else {})


def test_what_is_wrong_is_named_before_anything_is_trained(shop: Path, tmp_path: Path):
    options = TuneOptions(shop, tmp_path / "study", PRESETS["tiny"], tmp_path, only=("encoders.dim",))
    with pytest.raises(InvalidInput, match=r"--over encoders\.dim: is not searched; what is: "):
        tune(options, Console(quiet=True))
    with pytest.raises(InvalidInput, match="nowhere"):
        tune(replace(options, shop=tmp_path / "nowhere", only=()), Console(quiet=True))


def test_a_trial_that_does_worse_than_most_is_given_up_but_the_start_never(tmp_path: Path):
    study = open_study(tmp_path, 0, {"x": 0.5})
    for at, best in enumerate([0.5, 0.4, 0.6, 0.55, 0.45]):
        trial = study.ask()
        assert trial.suggest_float("x", 0, 1) == 0.5 or at, "the first is the start"
        trial.report(best, 1)
        assert not trial.should_prune(), "too few to judge by"
        study.tell(trial, best)
    bad, good = study.ask(), study.ask()
    bad.report(0.49, 1), good.report(0.51, 1)
    assert bad.should_prune()
    assert not good.should_prune()
    give_up_running(study)
    again = open_study(tmp_path, 0, {"x": 0.5})
    assert num_ended(again) == 5
    assert len(again.trials) == 7, "the journal holds all"
    assert again.ask().suggest_float("x", 0, 1) != 0.5, "a start that has a value is not begun again"


def test_a_training_that_begins_again_is_not_told_twice(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    study, (ours, theirs) = open_study(tmp_path, 0, {"x": 0.5}), multiprocessing.Pipe()
    search = Search(study, {}, {}, Work(tmp_path, {}, PRESETS["tiny"], 0, 1, RANKER), 1, print, print)
    trial = study.ask()
    worker = _Running(multiprocessing.current_process(), ours, trial)
    for number, validation in ((1, 0.1), (2, 0.3), (1, 0.2), (2, 0.4), (3, 0.5)):
        search._take(worker, Epoch(number, validation))
        assert theirs.recv() is True
    assert study.get_trials()[0].intermediate_values == {1: 0.1, 2: 0.3, 3: 0.5}
    assert not [one for one in recwarn if "already reported" in str(one.message)]


KILLED = """
import multiprocessing, os, signal, time
from pathlib import Path


def serve(line):
    from builders.presets import PRESETS
    from builders.tune import worker

    def run(*of):
        line.send(os.getpid())
        time.sleep(60)  # an epoch in which nothing is told

    worker._run = run
    worker.serve(worker.Work(Path("."), {}, PRESETS["tiny"], 0, 1, worker.RANKER), line)


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs,)).start()
    ours.send("a job")
    print(ours.recv(), flush=True)
    signal.pause()
"""


def test_who_works_for_a_search_that_is_killed_ends_with_it(tmp_path: Path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment()) as search:
        assert search.stdout is not None
        status = Path(f"/proc/{int(search.stdout.readline())}/stat")
        search.kill()
    wait_until(lambda: not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z")
