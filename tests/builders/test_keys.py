"""What makes a stage run again (code, libraries, the shop's files, one's own models), and what does not."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from shops import ROOT, SEQUENCES_TOML, write_sequences_shop

import builders.build
import builders.keys
from builders.build import BuildOptions, build, table
from builders.keys import FileDigests, closure, code_digest, own_key, shop_digest
from builders.presets import preset
from builders.stages import Stages
from ensemble import contract
from ensemble.errors import InvalidInput

STAGES = ["data", "encoders", "index", "ranker", "export", "compress", "verify", "publish"]


# --- code


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources, to be changed."""
    for package in ("builders", "ensemble"):
        shutil.copytree(
            ROOT / package, tmp_path / "sources" / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path / "sources"


def digests(sources: Path) -> dict[str, str]:
    return {stage: code_digest(f"builders.{stage}", sources) for stage in STAGES}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A copy of the sources that is always put right again, and its stages' digests: what is parsed once
    stays known."""
    folder = tmp_path_factory.mktemp("tree")
    for package in ("builders", "ensemble"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder, digests(folder)


def changed(tree: tuple[Path, dict[str, str]], file: str, text: str = "\n# another state\n") -> list[str]:
    """The stages whose code is another when `text` is appended to `file`."""
    sources, before = tree
    path = sources / file
    kept, stat = path.read_bytes(), path.stat()
    try:
        path.write_bytes(kept + text.encode())
        after = digests(sources)
    finally:
        path.write_bytes(kept)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return [stage for stage in STAGES if before[stage] != after[stage]]


@pytest.mark.parametrize(
    "file",
    [
        "builders/bench/index.py",
        "builders/cli/build.py",
        "builders/cli/shop.py",
        "builders/report/html.py",
        "builders/compare/chain.py",
        "builders/shop/generate.py",
        "builders/build.py",
        "builders/stages.py",
        "builders/keys.py",
        "ensemble/cli/serve.py",
        "ensemble/server/supervisor.py",
    ],
)
def test_a_bench_a_command_line_or_the_server_is_no_stages_code(tree, file):
    assert changed(tree, file) == []


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("builders/data/packing.py", "data"),
        ("builders/shop/read.py", "data"),
        ("builders/encoders/training.py", "encoders"),
        ("builders/encoders/models.py", "encoders index ranker export compress"),
        ("builders/ranker/trainer.py", "ranker"),
        ("builders/ranker/model.py", "ranker export compress verify"),
        ("builders/verify/markdown.py", "verify"),
        ("ensemble/steps/reranking.py", "export compress verify"),
        ("ensemble/schema.py", " ".join(STAGES)),
    ],
)
def test_a_changed_file_is_the_code_of_the_stages_that_import_it(tree, file, stages):
    assert changed(tree, file) == stages.split()


def test_a_new_file_in_a_stages_folder_is_its_code(sources):
    (sources / "builders" / "ranker" / "novelty.py").touch()
    assert changed((sources, digests(sources)), "builders/ranker/novelty.py") == ["ranker"]
    before = code_digest("builders.ranker", sources)
    (sources / "builders" / "ranker" / "another.py").touch()
    assert code_digest("builders.ranker", sources) != before


def test_touching_a_file_changes_no_key(sources):
    before = code_digest("builders.ranker", sources)
    for path in sources.rglob("*.py"):
        path.touch()
    assert code_digest("builders.ranker", sources) == before


TYPES_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import builders.types_only\n"


def test_imports_are_followed_wherever_they_stand_but_for_those_of_types(tmp_path):
    """At the top, in functions, relative ones, whole packages, and packages' own files."""
    for name, text in {
        "builders/__init__.py": "",
        "builders/a.py": "import builders.b\nfrom builders import c\nimport numpy\n",
        "builders/b.py": "def f():\n    from ensemble.far.deep import thing\n",
        "builders/c.py": TYPES_ONLY,
        "builders/types_only.py": "",
        "builders/not_imported.py": "",
        "builders/cli/__init__.py": "",
        "ensemble/__init__.py": "",
        "ensemble/far/__init__.py": "from . import beside\n",
        "ensemble/far/deep.py": "from .beside import x\nfrom ..near import y\nimport builders.cli\n",
        "ensemble/far/beside.py": "",
        "ensemble/near.py": "import builders.a\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sorted(closure(["builders.a"], tmp_path)) == [
        "builders",
        "builders.a",
        "builders.b",
        "builders.c",
        "ensemble",
        "ensemble.far",
        "ensemble.far.beside",
        "ensemble.far.deep",
        "ensemble.near",
    ]


IMPORT_EACH = """\
import importlib, os, sys
import faiss, onnx, onnxruntime, pyarrow.parquet, pydantic, torch, tritonclient.grpc  # once, for all children
for stage in sys.argv[1:]:
    if not os.fork():
        importlib.import_module(f"builders.{stage}.stage")
        ours = [name for name in sys.modules if name.partition(".")[0] in ("builders", "ensemble")]
        print(*ours, flush=True)
        os._exit(0)
    os.wait()
"""


def test_what_importing_a_stage_loads_is_its_code():
    """Held against Python itself: of our modules, a fresh import of the stage loads none but its closure."""
    command = [sys.executable, "-c", IMPORT_EACH, *STAGES]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for stage, names in zip(STAGES, loaded, strict=True):
        assert set(names.split()) - closure([f"builders.{stage}.stage"]).keys() == set()


def test_steps_that_offline_recall_opens_by_name_are_code_of_the_index(tiny_release):
    """open_step imports them by their names in the contract, which no import statement says."""
    models = contract.recommend(tiny_release.schema).models
    names = [model.name for model in models]
    between = [m for m in models[: names.index("recall")] if m.name not in ("features", "user_encoder")]
    code = closure(["builders.index.stage"])
    assert [m.name for m in between if m.step.partition(":")[0] not in code] == []


# --- libraries


@pytest.mark.parametrize("library", ["torch", "numpy", "faiss-cpu", "onnx", "onnxruntime"])
def test_another_version_of_a_library_is_another_key(tmp_path, monkeypatch, library):
    options = BuildOptions(tmp_path, tmp_path, preset("tiny"))
    stages = Stages(tmp_path, Console(quiet=True))
    stages.give("shop", tmp_path, None)
    stages.give("catalogue", tmp_path, None)
    first = table(options)[0]
    before, version = stages.key(first), importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.0.1" if name == library else version(name)
    )
    assert stages.key(first) != before


# --- the shop's files


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A shop whose interactions lie in a sub-folder, all of its files a minute old."""
    write_sequences_shop(tmp_path / "shop", users=30, items=60)
    (tmp_path / "shop" / "data").mkdir()
    (tmp_path / "shop" / "interactions.parquet").rename(tmp_path / "shop" / "data" / "i.parquet")
    (tmp_path / "shop" / "shop.toml").write_text(
        SEQUENCES_TOML.replace('"interactions.parquet"', '"data/i.parquet"')
    )
    age(tmp_path / "shop")
    return tmp_path / "shop"


def age(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 60,) * 2)


def with_images(shop: Path) -> Path:
    toml = (shop / "shop.toml").read_text()
    features = 'features = [{name = "picture", kind = "image", column = "title"}, '
    (shop / "shop.toml").write_text(toml.replace("features = [", features))
    (shop / "images").mkdir()
    (shop / "images" / "1.png").write_bytes(b"a picture")
    age(shop)
    return shop


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content is digested."""
    names: list[str] = []
    digest = builders.keys.file_sha256

    def counted(path: Path) -> str:
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(builders.keys, "file_sha256", counted)
    return names


def digest_of(shop: Path, **options: bool) -> list[tuple[str, str]]:
    digests = FileDigests(shop.parent / "digests.json", **options)
    found = shop_digest(shop, digests)
    digests.save()
    return found


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"x" * path.stat().st_size)
    os.utime(other, ns=(path.stat().st_mtime_ns,) * 2)
    other.rename(path)


@pytest.mark.parametrize("file", ["items.parquet", "data/i.parquet", "images/1.png"])
@pytest.mark.parametrize("change", [append, replace, Path.unlink], ids=["longer", "another inode", "gone"])
def test_a_changed_file_of_the_shop_in_a_sub_folder_too_is_another_shop(shop, file, change):
    with_images(shop)
    before = digest_of(shop)
    assert file in dict(before)
    change(shop / file)
    assert digest_of(shop) != before


def test_another_shop_toml_is_another_shop(shop):
    before = digest_of(shop)
    (shop / "shop.toml").write_text((shop / "shop.toml").read_text() + "# more\n")
    assert digest_of(shop) != before


def test_files_that_shop_toml_does_not_name_do_not_count(shop):
    before = digest_of(shop)
    (shop / "notes.txt").write_text("mine")
    assert digest_of(shop) == before


def test_images_behind_a_link_to_a_folder_count(shop, tmp_path):
    with_images(shop)
    shutil.move(shop / "images", tmp_path / "disk")
    (shop / "images").symlink_to(tmp_path / "disk")
    assert "images/1.png" in dict(digest_of(shop))


def test_a_second_build_reads_no_file_of_the_shop(shop, read):
    with_images(shop)
    first = digest_of(shop)
    assert sorted(read) == ["1.png", "i.parquet", "items.parquet", "shop.toml"]
    read.clear()
    assert digest_of(shop) == first
    assert read == []


def test_a_touched_file_is_read_again_and_is_the_same_shop(shop, read):
    first = digest_of(shop)
    read.clear()
    os.utime(shop / "items.parquet", (time.time() - 30,) * 2)
    assert digest_of(shop) == first
    assert read == ["items.parquet"]


def test_a_file_that_was_just_written_is_not_taken_for_unchanged(shop, read):
    """Its clock may not tell a second change from the first."""
    (shop / "items.parquet").touch()
    digest_of(shop)
    read.clear()
    digest_of(shop)
    assert read == ["items.parquet"]


def test_rehash_finds_a_change_behind_the_same_size_and_time(shop):
    before, stat = digest_of(shop), (shop / "items.parquet").stat()
    with (shop / "items.parquet").open("r+b") as file:  # the same inode
        file.write(b"XXXX")
    os.utime(shop / "items.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest_of(shop) == before, "this is what --rehash is for"
    changed = digest_of(shop, rehash=True)
    assert changed != before
    assert digest_of(shop) == changed, "and the next build knows it too"


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_spoiled_cache_of_digests_costs_reading_only(shop, text):
    before = digest_of(shop)
    (shop.parent / "digests.json").write_text(text)
    assert digest_of(shop) == before


# --- one's own models


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Gives the digest of one's own MODULE:CLASS in a fresh Python's eyes."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def digest(source: str) -> str:
        for name in set(sys.modules) - before:
            del sys.modules[name]
        importlib.invalidate_caches()
        key = own_key(source)
        assert key is not None
        return key.digest

    yield digest
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_helper_beside_an_own_model_is_its_code(own, tmp_path):
    (tmp_path / "lonely.py").write_text("from helper_of_lonely import width\n\nclass Mine: ...\n")
    (tmp_path / "helper_of_lonely.py").write_text("width = 1\n")
    (tmp_path / "stranger.py").write_text("")
    digests = [own("lonely:Mine")]
    (tmp_path / "stranger.py").write_text("other = 1\n")
    assert own("lonely:Mine") == digests[0]
    for file, text in (("helper_of_lonely", "width = 22\n"), ("lonely", "class Mine: ...  # another\n")):
        (tmp_path / f"{file}.py").write_text(text)
        digests.append(own("lonely:Mine"))
    assert len(set(digests)) == 3


def test_an_own_models_whole_package_is_its_code(own, tmp_path):
    """Also what no import statement names: it may be loaded by name."""
    for file in ("__init__", "towers/__init__", "towers/user", "losses"):
        path = tmp_path / "own_package" / f"{file}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("class Mine: ...\n")
    digests = [own("own_package.towers.user:Mine")]
    for file in ("losses", "towers/user", "__init__"):
        (tmp_path / "own_package" / f"{file}.py").write_text("class Mine: ...  # another\n")
        digests.append(own("own_package.towers.user:Mine"))
    assert len(set(digests)) == 4
    assert own("own_package:Mine") == digests[-1]


def test_an_own_model_is_found_where_python_finds_it_not_in_the_current_folder_alone(
    own, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "far_model.py").write_text("class Mine: ...\n")
    before = own("far_model:Mine")
    (tmp_path / "elsewhere" / "far_model.py").write_text("class Mine: ...  # another\n")
    assert own("far_model:Mine") != before != ""


def test_an_own_model_that_cannot_be_imported_is_left_to_the_check_that_says_why(own):
    assert own("nowhere_at_all:Mine") == ""


def test_another_state_of_an_own_ranker_runs_the_ranker_and_not_the_encoders(own, tmp_path):
    """The keys of a whole build, none of whose stages runs."""

    def keys() -> dict[str, str]:
        own("ranker_of_mine:Mine")  # forgets the module
        options = BuildOptions(tmp_path, tmp_path, preset("tiny"), ranker="ranker_of_mine:Mine")
        stages, found = Stages(tmp_path, Console(quiet=True)), {}
        stages.give("shop", tmp_path, None)
        stages.give("catalogue", tmp_path, None)
        for stage in table(options):
            found[stage.name] = stages.key(stage)
            stages.given[stage.name] = found[stage.name], tmp_path
        return found

    (tmp_path / "ranker_of_mine.py").write_text("class Mine: ...\n")
    before = keys()
    (tmp_path / "ranker_of_mine.py").write_text("class Mine: ...  # another\n")
    after = keys()
    again = ["ranker", "export", "verify"]
    changed = [name for name in before if before[name] != after[name]]
    assert changed == [*again, *(f"refit_{name}" for name in again)]


# --- whole builds, whose stages do nothing


def test_a_change_of_the_ranker_runs_it_and_what_is_behind_it(sources, tmp_path):
    options, ran = BuildOptions(tmp_path, tmp_path, preset("tiny")), []

    def run() -> list[str]:
        stages = Stages(tmp_path / "stages", Console(quiet=True), sources)
        stages.give("shop", tmp_path, None)
        stages.give("catalogue", tmp_path, None)
        for stage in table(options):
            done = stages.run(stage_that_does_nothing(stage))
            if not done.skipped:
                ran.append(stage.name)
        return [ran.pop(0) for _ in list(ran)]

    names = [stage.name for stage in table(options)]
    assert run() == names
    assert run() == []
    append(sources / "builders" / "bench" / "index.py")
    append(sources / "builders" / "cli" / "build.py")
    assert run() == []
    with (sources / "builders" / "ranker" / "loss.py").open("a") as file:
        file.write("# another\n")
    again = ["ranker", "export", "verify"]
    assert run() == [*again, *(f"refit_{name}" for name in again)]


def stage_that_does_nothing(stage):
    def run(inputs, options, folder, progress):
        (folder / "done").touch()

    run.__module__ = stage.run.__module__
    return dataclasses.replace(stage, run=run)


def test_a_shop_without_its_table_is_refused_by_the_stage_that_reads_it(shop, tmp_path):
    (shop / "data" / "i.parquet").unlink()
    with pytest.raises(InvalidInput, match=r"i\.parquet is missing"):
        build(BuildOptions(shop, tmp_path / "repository", preset("tiny")), Console(quiet=True))
