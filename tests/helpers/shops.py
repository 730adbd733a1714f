"""Shops and releases that several tests share: built once for each state of the sources, kept under pytest's
cache."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
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
features = [
  {name = "kind", kind = "category"},
  {name = "attributes", kind = "category", separator = "|", width = 4},
]
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
    """The plain generated shop: three tasks, users with features, a clock, the planted truth, and a context
    that tells nothing: a device, which some rows lack, and an hour."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from builders.shop.generate import generate_shop

    generate_shop(folder, users=600, items=300, events=20_000, seed=0, images=False, plain=True)
    path, rng = folder / "interactions.parquet", np.random.default_rng(0)
    table = pq.read_table(path)
    devices = rng.choice(["phone", "desktop", "tablet", ""], len(table), p=[0.5, 0.3, 0.1, 0.1])
    table = table.append_column("device", pa.array(devices, mask=devices == ""))
    pq.write_table(table.append_column("hour", pa.array(rng.integers(0, 24, len(table)))), path)
    with (folder / "shop.toml").open("a") as toml:
        toml.write('\n[context]\nfeatures = [\n  {name = "device", kind = "category"},\n')
        toml.write('  {name = "hour", kind = "number"},\n]\n')


def write_pictured_shop(folder: Path) -> None:
    """A generated shop whose titles and pictures are encoded, by small checkpoints in its folder."""
    from checkpoints import write_checkpoint

    from builders.shop.generate import generate_shop

    generate_shop(folder, users=300, items=120, events=6_000, images=True, plain=True)
    write_checkpoint(folder / "models" / "text", "bert")
    write_checkpoint(folder / "models" / "image", "vit")
    text = (folder / "shop.toml").read_text()
    for kind in ("text", "image"):
        text = text.replace(f'kind = "{kind}"\n', f'kind = "{kind}"\nencoder = "models/{kind}"\nwidth = 16\n')
    (folder / "shop.toml").write_text(text)


SHOPS: dict[str, Callable[[Path], None]] = {
    "tiny": write_labelled_shop,
    "sequences": write_sequences_shop,
    "pictured": write_pictured_shop,
}


class ReleaseCache:
    """Holds repositories with one active release each, shared by all test processes on this machine.

    Builds that a run will need start together, one thread each: two cores, two builds. Whoever comes first
    starts a build in a process that holds the release's lock until it ends; everybody waits for that lock.
    """

    def __init__(self, root: Path, wanted: list[str]) -> None:
        from builders.keys import code_digest

        # A developer who changes what makes no release another one may keep those of the last run.
        kept = os.environ.get("PEREGRINE_TEST_RELEASES")
        self.root, self.wanted = Path(kept) if kept else root / code_digest("builders.build")[:16], wanted
        self._builds: dict[str, subprocess.Popen[bytes]] = {}
        self.root.mkdir(parents=True, exist_ok=True)
        if not kept:
            self._remove_old()

    def folder(self, name: str) -> Path:
        """Gives a folder that holds shop/ and repository/; builds them first where that is not done."""
        folder = self.root / name
        for _ in range(2):  # another run may have started the build, and been stopped
            if (folder / "built").exists():
                return folder
            for one in sorted({*self.wanted, name}):
                self._start(one)
            with (folder / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built").exists():
            raise AssertionError(f"peregrine build failed:\n{(folder / 'log').read_text()[-4000:]}")
        return folder

    def close(self) -> None:
        """Ends what was started and not waited for; its finished stages stay for the next run."""
        for process in self._builds.values():
            process.kill()
            process.wait()

    def _start(self, name: str) -> None:
        """Starts a build unless it is done, or somebody is at it."""
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        with (folder / ".lock").open("w") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (folder / "built").exists():
                with (folder / "log").open("wb") as log:
                    self._builds[name] = subprocess.Popen(
                        [sys.executable, __file__, name, str(folder)],
                        env=one_thread(PYTHONPATH=str(ROOT)),
                        pass_fds=[lock.fileno()],  # so the lock is held until that process ends
                        stdout=log,
                        stderr=log,
                    )

    def _remove_old(self) -> None:
        """Removes the releases of source states that are an hour older than this one."""
        for old in self.root.parent.iterdir():
            with contextlib.suppress(OSError):  # another process removes it too
                if old != self.root and old.stat().st_mtime < self.root.stat().st_mtime - 3600:
                    shutil.rmtree(old, ignore_errors=True)


def build_release(name: str, folder: Path) -> None:
    """Writes the shop and builds its release r1, in this process."""
    import peregrine

    shop, repository = folder / "shop", folder / "repository"
    if not (shop / "shop.toml").exists():
        shutil.rmtree(shop, ignore_errors=True)
        SHOPS[name](shop)
    # Of a killed run the finished stages (.build) stay, half a release does not.
    for left in repository.glob("[!.]*"):
        shutil.rmtree(left)
    # named, as a killed build may have used a number up
    options = ["--release", "r1", "--preset", "tiny", "--activate", "--json", "--repository", str(repository)]
    sys.argv = ["peregrine", "build", str(shop), *options]
    try:
        peregrine.main()
    except SystemExit as end:
        if end.code:
            raise
    (folder / "built").touch()


def one_thread(**more: str) -> dict[str, str]:
    """The environment of a child that must not take both cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **more}


def private_copy(repository: Path, target: Path) -> Path:
    """A copy of a repository without its stages and locks, for a test (or a server) to do with as it
    likes."""
    from clients.bench.inputs import working_copy

    return working_copy(repository, target)


if __name__ == "__main__":
    build_release(sys.argv[1], Path(sys.argv[2]))
