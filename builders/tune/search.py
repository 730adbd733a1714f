"""Runs the trials of a study, some processes at once, until there are enough or the time is over.

Settings are drawn by Optuna's tree-structured Parzen estimator (Bergstra et al., NIPS 2011); a trial whose
best epoch so far is below the median of what others had after as many is given up (Golovin et al., KDD 2017).
This process alone writes the study, an append-only journal: whatever is killed, it can be gone on with.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from builders.tune.space import Knob, changes_of
from builders.tune.worker import Epoch, Job, Result, Step, Work, serve
from ensemble.errors import ReleaseError
from ensemble.progress import Update

JOURNAL, NAME = "journal.log", "tune"
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
_RANDOM = 5  # trials drawn by chance before the estimator, and before the first is given up
_BEAT_S = 0.5  # the longest wait for news, so that the time is looked at


@dataclass
class _Running:
    """Holds a process and the trial that it is at."""

    process: BaseProcess
    line: Connection
    trial: Trial | None = None
    step: str = "begins"
    epoch: int = 0  # the last one that was told: a ranker that stalled early is trained again, from 1


def open_study(folder: Path, seed: int, start: Mapping[str, Any]) -> optuna.Study:
    """Opens a folder's study, or begins one with the trial of its start; trials that were cut off have
    failed."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    study = optuna.create_study(
        storage=storage,
        study_name=NAME,
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_RANDOM),
    )
    give_up_running(study)
    trials = study.get_trials(deepcopy=False)
    # a study that goes on draws other settings than it drew at its begin
    study.sampler = optuna.samplers.TPESampler(
        seed=seed + len(trials), n_startup_trials=_RANDOM, constant_liar=True
    )
    if not any(trial.state in (*ENDED, TrialState.WAITING) for trial in trials):
        study.enqueue_trial(dict(start), user_attrs={"start": True})
    return study


def give_up_running(study: optuna.Study) -> None:
    """Lets the trials fail that nobody is at any more; one that was the start is begun again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def num_ended(study: optuna.Study) -> int:
    """Counts the trials that came to an end: a value, or given up early."""
    return len(study.get_trials(deepcopy=False, states=ENDED))


@dataclass
class Search:
    """Runs trials of a study over a space."""

    study: optuna.Study
    space: Mapping[str, Knob]
    start: Mapping[str, Any]
    work: Work
    trials: int  # of the study, in all
    say: Callable[[str], None]
    update: Update

    def run(self, jobs: int, deadline: float) -> str:
        """Runs trials until there are enough ("trials") or time.monotonic() is `deadline` ("minutes");
        KeyboardInterrupt ends it too. Trials at work are then given up."""
        left = self.trials - num_ended(self.study)
        self._left = max(0, left)
        workers = [self._worker() for _ in range(min(jobs, self._left))]
        try:
            for worker in workers[:1]:  # alone, if it is the start: all else is judged beside it
                self._next(worker)
            while any(worker.trial for worker in workers):
                if time.monotonic() > deadline:
                    return "minutes"
                self._hear(workers)
                for worker in workers:
                    if worker.trial is None and self._left and self._is_begun():
                        self._next(worker)
            return "trials"
        finally:
            for worker in workers:
                worker.line.close()
                worker.process.kill()
                worker.process.join()
            give_up_running(self.study)

    def _is_begun(self) -> bool:
        """Says whether the start has a value."""
        return bool(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def _worker(self) -> _Running:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(self.work, theirs), daemon=True)
        process.start()
        theirs.close()
        return _Running(process, ours)

    def _next(self, worker: _Running) -> None:
        """Gives a process its next trial."""
        trial = self.study.ask()
        changes = changes_of(trial, self.space, self.start)
        trial.set_user_attr("changes", changes)
        worker.trial, worker.step, worker.epoch = trial, "begins", 0
        worker.line.send(Job(trial.number, changes))
        self._left -= 1

    def _hear(self, workers: list[_Running]) -> None:
        """Takes the news of all processes, or waits a moment for some."""
        busy = {worker.line: worker for worker in workers if worker.trial}
        for line in wait(list(busy), _BEAT_S):
            worker = busy[line]  # type: ignore[index]
            try:
                self._take(worker, worker.line.recv())
            except EOFError:
                worker.process.join()
                code = worker.process.exitcode
                self._end(worker, Result(None, 0.0, why_not=f"its process ended with {code}: memory?"))
                fresh = self._worker()
                worker.process, worker.line = fresh.process, fresh.line
        steps = ", ".join(f"trial {one.trial.number}: {one.step}" for one in workers if one.trial)
        self.update(steps, num_ended(self.study) / self.trials)

    def _take(self, worker: _Running, news: Step | Epoch | Result) -> None:
        trial = worker.trial
        assert trial is not None
        if isinstance(news, Step):
            worker.step = news.text
        elif isinstance(news, Epoch):
            is_new, worker.epoch = news.number > worker.epoch, max(news.number, worker.epoch)
            if is_new:
                trial.report(news.validation, news.number)
            worker.line.send(not is_new or "start" in trial.user_attrs or not trial.should_prune())
        else:
            self._end(worker, news)

    def _end(self, worker: _Running, result: Result) -> None:
        """Writes what came of a trial; ReleaseError if the start has no value, or nothing has any more."""
        trial = worker.trial
        assert trial is not None
        worker.trial = None
        facts = {"seconds": result.seconds, "figure": result.figure, "measure": result.measure}
        for name, fact in facts.items():
            trial.set_user_attr(name, fact)
        if result.value is not None:
            trial.set_user_attr("rows", str(result.rows and result.rows.name))
            self.study.tell(trial, result.value)
            best = self.study.best_trial
            self.say(
                f"trial {trial.number}: {result.value:.5f} (best {best.value:.5f}, trial {best.number}), "
                f"{result.seconds:.0f} s"
            )
        elif result.pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
            self.say(f"trial {trial.number}: given up after {result.seconds:.0f} s, others did better")
        else:
            trial.set_user_attr("why_not", result.why_not)
            self.study.tell(trial, state=TrialState.FAIL)
            self.say(f"trial {trial.number} failed: {result.why_not}")
            if "start" in trial.user_attrs:
                raise ReleaseError(f"the preset itself cannot be judged: {result.why_not}")
