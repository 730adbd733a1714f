"""Runs the stages of a build: skips those whose inputs and options are unchanged, times the others, survives
being killed.

A stage is a function that fills a folder. Its key is the digest of its name, its options, the keys of what it
reads, the code it runs and the versions of its libraries, so that a change of any of them makes it run again,
and those behind it. The folder gets its final name by rename when the stage is done; a killed stage leaves
only a temporary folder, removed by the next build. Two builds that need the same stage at once run it once:
the second waits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from builders.folders import SOURCES, Inputs, only_one
from builders.keys import code_digest, library_versions
from builders.progress import Progress
from ensemble.errors import ReleaseError
from ensemble.progress import bar
from ensemble.release.files import write_durably

REFIT = "refit_"  # begins the names of a refit's stages
_SECONDS = "seconds.json"  # beside the folders: what each took
_KEPT = 3  # finished folders kept of each stage


@dataclass(frozen=True)
class Stage:
    """Says what one stage runs, with what options (JSON-able, or a dataclass), and which others it reads.

    A stage `refit_X` does once more what stage X did: who reads it knows it as X, and may read the first one
    beside it, as `verified_X`.
    """

    name: str
    run: Callable[[Inputs, Any, Path, Progress], None]
    options: Any = None
    reads: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()  # stages that a refit reads beside its own
    always: bool = False  # runs even if a folder with its key is there


@dataclass(frozen=True)
class Done:
    """Holds what became of a stage."""

    name: str
    key: str
    folder: Path
    skipped: bool
    duration_s: float
    peak_bytes: int
    took_s: float | None = None  # of the build that ran it, which may be an earlier one; None: not known


@dataclass
class Stages:
    """Runs the stages of one build, in their order; `root` holds their folders."""

    root: Path
    console: Console
    sources: Path = SOURCES  # the folder of the code that makes the keys
    done: list[Done] = field(default_factory=list)
    given: dict[str, tuple[str, Path]] = field(default_factory=dict)  # key and folder, by name

    def give(self, name: str, folder: Path, facts: Any) -> None:
        """Names a folder that stages read and none of them made: the shop's. `facts` is its content."""
        self.given[name] = _digest(facts), folder

    def run(self, stage: Stage) -> Done:
        """Runs a stage unless a folder with the same key is there."""
        key = self.key(stage)
        name, start = f"{stage.name}-{key}", time.monotonic()
        # What always runs has a folder of its own each time: another build may read the one before.
        folder = self.root / (f"{name}-{time.time_ns():x}" if stage.always else name)
        try:
            skipped = not self._make(stage, folder, name)
        except (OSError, RuntimeError) as error:  # Faiss says it with a RuntimeError
            told = _told(error, stage.name, self.root)
            if told is None:
                raise
            raise told from error
        peak, duration_s = 0 if skipped else peak_bytes(), time.monotonic() - start
        took_s = self._took(folder.name, None if skipped else duration_s)
        self.done.append(Done(stage.name, key, folder, skipped, duration_s, peak, took_s))
        self.given[stage.name] = key, folder
        return self.done[-1]

    def key(self, stage: Stage) -> str:
        """Gives the 16 hex digits that name a stage's folder."""
        code = code_digest(stage.run.__module__.rpartition(".")[0], self.sources)
        reads = [self.given[name][0] for name in (*stage.reads, *stage.verified)]
        return _digest([stage.name, _plain(stage.options), reads, code, library_versions()])

    def folders(self, stage: Stage) -> Inputs:
        """Gives the folders that a stage reads, by name."""
        own = {name.removeprefix(REFIT): self.given[name][1] for name in stage.reads}
        return own | {f"verified_{name}": self.given[name][1] for name in stage.verified}

    def _make(self, stage: Stage, folder: Path, name: str) -> bool:
        """Fills the folder, or finds it done, perhaps by a build beside this one (False)."""
        if folder.is_dir() and not stage.always:
            os.utime(folder)
            return False
        self.root.mkdir(parents=True, exist_ok=True)
        with only_one(self.root / f".{name}.lock", lambda: self._tell_waiting(stage.name)):
            if folder.is_dir() and not stage.always:
                return False
            for left in (folder, *self.root.glob(f"{name}*.partial")):  # by a build that was killed
                shutil.rmtree(left, ignore_errors=True)
            self._fill(stage, folder)
        self._drop_old(stage.name)
        return True

    def _took(self, name: str, duration_s: float | None) -> float | None:
        """Gives what a stage took when it ran, which is kept for builds that skip it; None: it is skipped."""
        kept: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads((self.root / _SECONDS).read_text())
        if duration_s is None:
            return kept.get(name)
        there = {one: seconds for one, seconds in kept.items() if (self.root / one).is_dir()}
        with contextlib.suppress(OSError):  # a report that lacks it is no reason to stop a build
            write_durably(self.root / _SECONDS, json.dumps({**there, name: round(duration_s, 2)}))
        return duration_s

    def _tell_waiting(self, name: str) -> None:
        self.console.print(f"stage {name}: another build is at work on it; waiting until it is done")

    def _fill(self, stage: Stage, folder: Path) -> None:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            self._show(stage, partial)
            partial.rename(folder)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _show(self, stage: Stage, partial: Path) -> None:
        """Runs the stage behind a progress bar."""
        reset_peak()
        with bar(stage.name, self.console) as update:
            stage.run(self.folders(stage), stage.options, partial, lambda share, text: update(text, share))

    def _drop_old(self, name: str) -> None:
        finished = [path for path in self.root.glob(f"{name}-*") if not path.name.endswith(".partial")]
        for path in sorted(finished, key=lambda path: path.stat().st_mtime)[:-_KEPT]:
            shutil.rmtree(path, ignore_errors=True)

    def table(self) -> Table:
        """Draws time and peak memory of each stage."""
        table = Table(title=None, box=None, pad_edge=False)
        for column, justify in (("stage", "left"), ("time", "right"), ("peak memory", "right"), ("", "left")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for stage in self.done:
            peak = "" if stage.skipped else f"{stage.peak_bytes / 2**20:,.0f} MiB"
            table.add_row(
                stage.name, f"{stage.duration_s:.1f} s", peak, "unchanged, skipped" if stage.skipped else ""
            )
        return table


def stages_folder(repository: Path, shop: Path) -> Path:
    """Gives the folder of all stages of a shop's builds into one repository."""
    return repository.resolve() / ".build" / shop.resolve().name


def _plain(options: Any) -> Any:
    """Gives a stage's options as JSON-able data: dataclasses and pydantic's models become tables. What is
    marked as no part of a key is left out."""
    if dataclasses.is_dataclass(options):
        entries = [entry for entry in dataclasses.fields(options) if entry.metadata.get("in_key", True)]
        return {entry.name: _plain(getattr(options, entry.name)) for entry in entries}
    return options.model_dump(mode="json") if hasattr(options, "model_dump") else options


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _told(error: Exception, stage: str, root: Path) -> ReleaseError | None:
    """Gives a full or read-only disk as one line with the cure; None for any other error."""
    if "No space left" in str(error) or "quota exceeded" in str(error):
        free_mb = shutil.disk_usage(root).free / 1e6 if root.exists() else 0
        return ReleaseError(
            f"stage {stage}: no space left in {root} ({free_mb:.0f} MB free); free some and build again, "
            "finished stages are kept"
        )
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ReleaseError(
            f"stage {stage}: cannot write {error.filename}: {error.strerror}; make it writable or choose "
            "another --repository"
        )
    return None


def reset_peak() -> None:
    """Restarts the kernel's record of this process's peak memory (Linux), so that each stage has its own."""
    with contextlib.suppress(OSError):  # another system: the peak is then of the whole run
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Gives the peak resident memory since reset_peak; 0 where the kernel does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
