"""Shops and releases that several tests share: built once for each state of the sources, kept under pytest's
cache."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]  # of the source tree under test

SEQUENCES_TOML = """\
name = "sequences"
split = "leave_one_out"

[interactions]
file = "interactions.parquet"
user = "user_id"
item = "item_id"
time = "position"

[items]
file = "items.parquet"
id = "item_id"
title = "title"
features = [{name = "kind", kind = "category"}, {name = "attributes", kind = "category", separator = "|", width = 4}]
"""


def write_sequences_shop(folder: Path, users: int = 1200, items: int = 400, seed: int = 0) -> None:
    """A shop like Beauty: sequences without labels or clock, numbers for ids, items with several attributes,
    no user table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    kind = rng.integers(0, 8, items)
    weights = 1 / np.arange(1, items + 1) ** 0.8
    histories = [_history(rng, kind, weights) for _ in range(users)]
    lengths = [len(h) for h in histories]
    interactions = {
        "user_id": [str(user) for user, n in enumerate(lengths, 1) for _ in range(n)],
        "item_id": [str(item + 1) for history in histories for item in history],
        "position": [place for n in lengths for place in range(n)],
    }
    attributes = [
        "|".join(sorted({f"a{k}", *(f"b{b}" for b in rng.integers(0, 12, rng.integers(0, 4)))})) for k in kind
    ]
    catalogue = {
        "item_id": [str(i) for i in range(1, items + 1)],
        "title": [f"item {i}" for i in range(1, items + 1)],
        "kind": [f"kind {k}" for k in kind],
        "attributes": attributes,
    }
    pq.write_table(pa.table(interactions), folder / "interactions.parquet")
    pq.write_table(pa.table(catalogue), folder / "items.parquet")
    (folder / "shop.toml").write_text(SEQUENCES_TOML)


def _history(rng: np.random.Generator, kind: np.ndarray, weights: np.ndarray) -> list[int]:
    """4 to 30 distinct items, most of the user's own two kinds."""
    mine = weights * np.where(np.isin(kind, rng.integers(0, 8, 2)), 10, 1)
    return rng.choice(
        len(kind), 4 + min(26, int(rng.exponential(5))), replace=False, p=mine / mine.sum()
    ).tolist()


def write_labelled_shop(folder: Path) -> None:
    """The generated shop: three tasks, users with features, a clock, the planted truth."""
    from builders.shop.generate import generate_shop

    generate_shop(folder, users=600, items=300, events=20_000, seed=0, images=False)


SHOPS: dict[str, Callable[[Path], None]] = {"tiny": write_labelled_shop, "sequences": write_sequences_shop}


@dataclass
class Build:
    """One `peregrine build --preset tiny --activate`, at work in a process of its own."""

    folder: Path
    process: subprocess.Popen[bytes]

    def wait(self) -> None:
        _, stderr = self.process.communicate()
        if self.process.returncode:
            raise AssertionError(
                "peregrine build failed with exit code "
                f"{self.process.returncode}:\n{stderr.decode(errors='replace')[-4000:]}"
            )
        (self.folder / "built").touch()


class ReleaseCache:
    """Repositories with one active release each. Builds that a test run will need start together: one thread
    each, two cores."""

    def __init__(self, root: Path, wanted: list[str]) -> None:
        from builders.stages import source_digest

        # A developer who changes what makes no release another one may keep those of the last run.
        kept = os.environ.get("PEREGRINE_TEST_RELEASES")
        self.root, self.wanted = Path(kept) if kept else root / source_digest()[:16], wanted
        self._builds: dict[str, Build] = {}

    def folder(self, name: str) -> Path:
        """Holds shop/ and repository/ when it is returned."""
        with self._locked():
            if not self._builds:
                self._builds = {
                    n: self._start(n) for n in {*self.wanted, name} if not (self.root / n / "built").exists()
                }
            if not (self.root / name / "built").exists():
                if name not in self._builds:
                    self._builds[name] = self._start(name)
                self._builds[name].wait()
        return self.root / name

    def close(self) -> None:
        """Ends what was started and not waited for; its finished stages stay for the next run."""
        for build in self._builds.values():
            if build.process.poll() is None:
                build.process.kill()
            build.process.wait()

    def _start(self, name: str) -> Build:
        folder = self.root / name
        if not (folder / "shop" / "shop.toml").exists():
            shutil.rmtree(folder / "shop", ignore_errors=True)
            SHOPS[name](folder / "shop")
        for left in (folder / "repository").glob(
            "[!.]*"
        ):  # of a killed run: its finished stages (.build) stay, half a release does not
            shutil.rmtree(left)
        command = [
            sys.executable,
            "-m",
            "peregrine",
            "build",
            str(folder / "shop"),
            "--preset",
            "tiny",
            "--activate",
            "--json",
        ]
        command += ["--repository", str(folder / "repository")]
        process = subprocess.Popen(
            command, cwd=ROOT, env=one_thread(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        return Build(folder, process)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Two test runs at once on one cache: the second waits, then finds all built."""
        self.root.mkdir(parents=True, exist_ok=True)
        for old in [] if "PEREGRINE_TEST_RELEASES" in os.environ else self.root.parent.iterdir():
            if old != self.root and old.stat().st_mtime < self.root.stat().st_mtime - 3600:
                shutil.rmtree(old, ignore_errors=True)
        with (self.root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def one_thread(**more: str) -> dict[str, str]:
    """The environment of a child that must not take both cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **more}


def private_copy(repository: Path, target: Path) -> Path:
    """A copy of a repository without its stages and locks, for a test (or a server) to do with as it
    likes."""
    shutil.copytree(repository, target, ignore=shutil.ignore_patterns(".build", ".lock", ".server.json"))
    return target
