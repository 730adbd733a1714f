"""What all tests share: this folder on the import path, skips that name what is missing, and releases built
once."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pretend
import pytest
from hypothesis import settings
from shops import SHOPS, ReleaseCache, private_copy

if TYPE_CHECKING:
    from ensemble.local import LocalPipeline
    from ensemble.steps.served import ServedRelease

# Tests serve as whoever runs them, and leave nothing in their home.
os.environ.setdefault("PEREGRINE_AS_ROOT", "1")
for home in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
    os.environ[home] = str(Path(tempfile.gettempdir()) / f"peregrine-tests-{os.geteuid()}")

pytest_plugins = ["redis_fixtures"]

# No deadline: a machine that is shared is slow now and then. The same examples on every run.
settings.register_profile("peregrine", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("peregrine")

# torch's exporter makes millions of objects, and Python's collector would look at them again and again: with
# its own thresholds a third of an export's time.
gc.set_threshold(50_000, 20, 50)


# The files that take longest start first, so that test processes that share the work end together.
LONGEST = (
    "tests/test_readme.py",
    "tests/builders/test_build.py",
    "tests/together/test_canary.py",
    "tests/builders/compare/test_compare.py",
    "tests/builders/compress/test_stage.py",
    "tests/congruence/",
    "tests/together/",
    "tests/clients/operations/",
    "tests/ensemble/server/",
    "tests/clients/bench/",
    "tests/builders/compress/",
    "tests/builders/encoders/",
    "tests/builders/compile/",
    "tests/builders/",
)
TOGETHER = ("tests/congruence/",)  # folders whose files share servers: one process runs them


@pytest.hookimpl(optionalhook=True)  # known where pytest-xdist is installed
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Gives each test process a file at a time, whose tests share servers, in the order of the collection."""
    from xdist.scheduler import LoadScopeScheduling

    class FilesScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((folder for folder in TOGETHER if file.startswith(folder)), file)

    config.option.loadscopereorder = False
    return FilesScheduling(config, log)


def _place(item: pytest.Item) -> int:
    return next((at for at, name in enumerate(LONGEST) if item.nodeid.startswith(name)), len(LONGEST))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)
    marks = {mark.name for item in items for mark in item.iter_markers()}
    missing = {name: reason for name, find in _MACHINES.items() if name in marks and (reason := find())}
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing_triton() -> str:
    from ensemble.errors import ServerError
    from ensemble.server.installation import find_tritonserver

    try:
        find_tritonserver()
    except ServerError as error:
        return str(error)
    return ""


def _missing_redis() -> str:
    if not shutil.which("redis-server"):
        return "redis-server is not installed"
    return "" if importlib.util.find_spec("redis") else "the Python package redis is not installed"


def _missing_gpu() -> str:
    return "" if shutil.which("nvidia-smi") else "no NVIDIA GPU: nvidia-smi is not on PATH"


_MACHINES = {"triton": _missing_triton, "redis": _missing_redis, "gpu": _missing_gpu}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def release_cache(request: pytest.FixtureRequest) -> Iterator[ReleaseCache]:
    """Builds the shops of this run's tests when the first of them is asked for."""
    used = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    wanted = [name for name in SHOPS if f"{name}_repository" in used]
    cache = ReleaseCache(Path(request.config.cache.mkdir("peregrine")), wanted)
    yield cache
    cache.close()


# --- the labelled shop: three tasks, user features


@pytest.fixture(scope="session")
def tiny_shop(release_cache: ReleaseCache) -> Path:
    """The generated shop's folder; read it only."""
    return release_cache.folder("tiny") / "shop"


@pytest.fixture(scope="session")
def tiny_repository(release_cache: ReleaseCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the active release r1; shared by the run's tests: read it only, private_copy() to
    change it."""
    return private_copy(
        release_cache.folder("tiny") / "repository", tmp_path_factory.mktemp("tiny") / "repository"
    )


@pytest.fixture(scope="session")
def tiny_release(tiny_repository: Path) -> ServedRelease:
    return _open(tiny_repository)


@pytest.fixture(scope="session")
def twin(tiny_release: ServedRelease) -> LocalPipeline:
    return _twin(tiny_release)


# --- the shop like Beauty: sequences without labels, one task `interact`


@pytest.fixture(scope="session")
def sequences_shop(release_cache: ReleaseCache) -> Path:
    return release_cache.folder("sequences") / "shop"


@pytest.fixture(scope="session")
def sequences_repository(release_cache: ReleaseCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return private_copy(
        release_cache.folder("sequences") / "repository", tmp_path_factory.mktemp("sequences") / "repository"
    )


@pytest.fixture(scope="session")
def sequences_release(sequences_repository: Path) -> ServedRelease:
    return _open(sequences_repository)


@pytest.fixture(scope="session")
def sequences_twin(sequences_release: ServedRelease) -> LocalPipeline:
    return _twin(sequences_release)


# --- the shop with encoders of its own


@pytest.fixture(scope="session")
def pictured_shop(pictured_repository: Path, release_cache: ReleaseCache) -> Path:
    return release_cache.folder("pictured") / "shop"


@pytest.fixture(scope="session")
def pictured_repository(release_cache: ReleaseCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="transformers is not installed (extra encoders)")
    return private_copy(
        release_cache.folder("pictured") / "repository", tmp_path_factory.mktemp("pictured") / "repository"
    )


@pytest.fixture(scope="session")
def pictured_release(pictured_repository: Path) -> ServedRelease:
    return _open(pictured_repository)


def _open(repository: Path) -> ServedRelease:
    from ensemble.release.release import active_release
    from ensemble.steps.served import open_served

    return open_served(repository, active_release(repository) or "none")


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A driver to pretend with: the environment of processes that find it."""
    return pretend.environment(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def compiled(gpu: dict[str, str], tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose release has plans, for the pretended GPU."""
    repository = private_copy(tiny_repository, tmp_path_factory.mktemp("plans") / "repository")
    done = pretend.peregrine(gpu, "compile", "-r", repository)
    assert done.returncode == 0, done.stderr
    return repository


def _twin(release: ServedRelease) -> LocalPipeline:
    from ensemble.local import LocalPipeline

    return LocalPipeline(release)
