"""Runs the stages of a build: skips those whose inputs and options are unchanged, times the others, survives
being killed.

A stage is a function that fills a folder. Its key is the digest of its name, its options, the keys of the
stages it reads and the source of this package, so a changed option, input or line of code makes it run again,
and those behind it. The folder gets its final name by rename when the stage is done; a killed stage leaves
only a temporary folder, removed by the next build.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.table import Table

from builders.progress import Progress
from ensemble.errors import ReleaseError
from ensemble.release.files import file_sha256

Report = Progress  # the old name, until nobody imports it
_KEPT = 3  # finished folders kept of each stage


@dataclass(frozen=True)
class Done:
    """A finished stage."""

    name: str
    key: str
    folder: Path
    skipped: bool
    duration_s: float
    peak_bytes: int


@dataclass
class Stages:
    """The stages of one build, in the order they ran; `root` holds their folders."""

    root: Path
    console: Console
    done: list[Done] = field(default_factory=list)

    def run(
        self,
        name: str,
        work: Callable[[Path, Progress], None],
        options: Any,
        after: tuple[Done, ...] = (),
        *,
        always: bool = False,
    ) -> Done:
        """Runs `work(folder, progress)` unless a folder with the same key is there (`always`: even then).
        `options` must be JSON-able."""
        facts = [name, options, [stage.key for stage in after], source_digest()]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        folder = self.root / f"{name}-{key}"
        start = time.monotonic()
        if always:
            shutil.rmtree(folder, ignore_errors=True)
        skipped = folder.is_dir()
        if skipped:
            os.utime(folder)
        else:
            self._fill(name, folder, work)
        self.done.append(
            Done(name, key, folder, skipped, time.monotonic() - start, 0 if skipped else peak_bytes())
        )
        return self.done[-1]

    def _fill(self, name: str, folder: Path, work: Callable[[Path, Progress], None]) -> None:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            self._show(name, partial, work)
            partial.rename(folder)
        except (OSError, RuntimeError) as error:  # Faiss says it with a RuntimeError
            shutil.rmtree(partial, ignore_errors=True)
            told = _told(error, name, self.root)
            if told is None:
                raise
            raise told from error
        self._drop_old(name)

    def _show(self, name: str, partial: Path, work: Callable[[Path, Progress], None]) -> None:
        """Runs the stage behind a progress bar."""
        reset_peak()
        columns = (
            bars.SpinnerColumn(),
            bars.TextColumn("{task.fields[stage]:<11}"),
            bars.BarColumn(bar_width=30),
            bars.TimeElapsedColumn(),
            bars.TextColumn("{task.description}"),
        )
        with bars.Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as bar:
            task = bar.add_task("", total=1.0, stage=name)
            work(partial, lambda share, text: bar.update(task, completed=share, description=text))

    def _drop_old(self, name: str) -> None:
        finished = [path for path in self.root.glob(f"{name}-*") if not path.name.endswith(".partial")]
        for path in sorted(finished, key=lambda path: path.stat().st_mtime)[:-_KEPT]:
            shutil.rmtree(path, ignore_errors=True)

    def table(self) -> Table:
        """Time and peak memory of each stage."""
        table = Table(title=None, box=None, pad_edge=False)
        for column, justify in (("stage", "left"), ("time", "right"), ("peak memory", "right"), ("", "left")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for stage in self.done:
            peak = "" if stage.skipped else f"{stage.peak_bytes / 2**20:,.0f} MiB"
            table.add_row(
                stage.name, f"{stage.duration_s:.1f} s", peak, "unchanged, skipped" if stage.skipped else ""
            )
        return table


def stages_of(repository: Path, shop: Path, console: Console) -> Stages:
    """The stages of a shop's builds into one repository."""
    return Stages(repository.resolve() / ".build" / shop.resolve().name, console)


def _told(error: Exception, stage: str, root: Path) -> ReleaseError | None:
    """A full or read-only disk as one line with the cure; None for any other error."""
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


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Digest of the Python sources that make a release."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted([*root.glob("builders/**/*.py"), *root.glob("ensemble/**/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def shop_digest(shop: Path) -> list[tuple[str, str]]:
    """Digests of a shop's tables and shop.toml (images are not read yet)."""
    return [(path.name, file_sha256(path)) for path in sorted(shop.glob("*")) if path.is_file()]


def module_digest(module: str | None) -> str | None:
    """A user's own MODULE:CLASS and its module's text: a changed module is another model."""
    if module is None:
        return None
    path = Path(module.partition(":")[0].replace(".", "/") + ".py")
    return module + (file_sha256(path) if path.is_file() else "")


def reset_peak() -> None:
    """Restarts the kernel's record of this process's peak memory (Linux), so that each stage has its own."""
    with contextlib.suppress(OSError):  # another system: the peak is then of the whole run
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak resident memory since reset_peak; 0 where the kernel does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
