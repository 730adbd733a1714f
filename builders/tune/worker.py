"""Runs trials in a process of its own, which says how far it is and asks whether an epoch's trial goes on.

It knows nothing of the study: one process writes that, so that a trial which is killed leaves it whole.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from builders.presets import Preset

ENCODERS, RANKER = "encoders", "ranker"  # whose epochs prune
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Work:
    """Says what every trial of a study begins from."""

    folder: Path  # trial-N is made in it, and removed
    ready: Mapping[str, Path]  # the stages that all trials share
    preset: Preset
    seed: int
    threads: int
    watched: str  # ENCODERS or RANKER


@dataclass(frozen=True)
class Job:
    """Asks for one trial: the preset with these changes."""

    number: int
    changes: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """Says how far a trial is."""

    share: float
    text: str


@dataclass(frozen=True)
class Epoch:
    """Tells an epoch's validation, and waits for a bool: whether the trial goes on."""

    number: int
    validation: float


@dataclass(frozen=True)
class Result:
    """Says what came of a trial: a value with the rows behind it, or why there is none."""

    value: float | None
    seconds: float
    figure: str = ""
    measure: str = ""
    rows: Path | None = None
    why_not: str = ""
    pruned: bool = False


class _Pruned(Exception):
    """Ends a trial that does worse than others did after as many epochs."""


def serve(work: Work, line: Connection) -> None:
    """Runs the trials that come over the `line`, until it is closed."""
    # Whoever asked may be killed: nobody listens then
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(work.threads)
    while True:
        try:
            job = line.recv()
        except EOFError:
            return
        line.send(_run(work, job, line))


def _run(work: Work, job: Job, line: Connection) -> Result:
    """Runs one trial."""
    import torch

    from builders.settings import with_settings
    from builders.tune.judging import judged
    from ensemble.errors import PeregrineError

    began, folder = time.monotonic(), work.folder / f"trial-{job.number}"
    shutil.rmtree(folder, ignore_errors=True)  # of a study that was killed

    def watch(epoch: int, validation: float) -> None:
        line.send(Epoch(epoch, validation))
        if not line.recv():
            raise _Pruned

    try:
        torch.manual_seed(work.seed)
        found = judged(
            work.ready,
            with_settings(work.preset, job.changes),
            work.seed,
            folder,
            lambda share, text: line.send(Step(share, text)),
            **{f"watch_{work.watched}": watch},
        )
        rows = work.folder / f"rows-{job.number}.npy"
        found.save(rows)
        return Result(found.value, time.monotonic() - began, found.figure, found.measure, rows)
    except _Pruned:
        return Result(None, time.monotonic() - began, pruned=True)
    except PeregrineError as error:
        return Result(None, time.monotonic() - began, why_not=str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
