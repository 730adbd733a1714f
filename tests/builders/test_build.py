"""The build as its user meets it: skips what is done, survives kill -9, refuses models that do not fit."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import light_models
import pytest
import typer
from rich.console import Console
from shops import ROOT, one_thread, private_copy
from typer.testing import CliRunner

from ensemble.errors import InvalidInput
from ensemble.release.names import release_names
from ensemble.release.release import active_release, open_release
from ensemble.release.repository import sweep
from ensemble.steps.served import open_served

KILLS = 10
# Imports once, then builds in forked children: a kill then meets the build, not ten times the import of
# torch.
DRIVER = """\
import os, sys
sys.path.insert(0, sys.argv[1])
import builders.build, builders.cli.build, clients.operations.releases, torch.onnx, peregrine
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        sys.argv = ["peregrine", *line.split()]
        try:
            peregrine.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Builds:
    """`peregrine build`, again and again, each in a process that can be killed."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        command = [sys.executable, "-c", DRIVER, str(ROOT)]
        self.driver = subprocess.Popen(
            command,
            cwd=folder,
            env=one_thread(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            text=True,
        )
        self.child = 0

    def start(self) -> None:
        """Begins a build."""
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        options = " ".join(light_models.OPTIONS)
        self.driver.stdin.write(f"build shop --preset tiny --repository repository --json {options}\n")
        self.driver.stdin.flush()
        self.child = int(next(line for line in self.driver.stdout if line.strip().isdigit()))

    def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError):  # it was done already
            os.kill(self.child, signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """The build's exit code (what it prints itself is JSON over many lines)."""
        assert self.driver.stdout is not None
        return int(next(line for line in self.driver.stdout if line.strip().lstrip("-").isdigit()))

    def close(self) -> None:
        self.driver.communicate()


@pytest.fixture(scope="module")
def small_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from builders.shop.generate import generate_shop

    folder = tmp_path_factory.mktemp("small") / "shop"
    generate_shop(folder, users=60, items=60, events=2000, seed=0, images=False)
    return folder


@pytest.fixture
def builds(tiny_repository: Path, small_shop: Path, tmp_path: Path) -> Iterator[Builds]:
    """A repository with the active release r1, and a shop whose release r2 is to be built beside it."""
    private_copy(tiny_repository, tmp_path / "repository")
    shutil.copytree(small_shop, tmp_path / "shop")
    light_models.write_light_models(tmp_path)
    builds = Builds(tmp_path, tmp_path / "log")
    yield builds
    builds.close()


def assert_serves_r1(repository: Path, alias: str) -> None:
    """The old release is active and whole; any other that exists is whole too."""
    assert (repository / "recommend" / "config.pbtxt").read_text() == alias
    assert active_release(repository) == "r1"
    for name in release_names(repository):
        open_release(repository, name).verify()


def test_a_build_killed_at_ten_random_moments_harms_nothing_and_the_next_completes(builds):
    repository = builds.folder / "repository"
    alias = (repository / "recommend" / "config.pbtxt").read_text()
    rng, killed_in = random.Random(0), []
    for _ in range(5 * KILLS):  # some builds are faster than their kill
        builds.start()
        if (
            len(killed_in) < KILLS // 2
        ):  # at any moment of a cold build; each goes on where the one before was killed
            time.sleep(rng.uniform(0, 1.5))
        else:  # in the middle of publishing: what of a release is there by then is not yet one
            wait_for(lambda: [*repository.glob(".staging-*"), *repository.glob("r2*")], 120)
            time.sleep(rng.uniform(0, 0.05))  # publishing a small release takes a tenth of a second
        code = builds.kill()
        assert_serves_r1(repository, alias)
        if code == -signal.SIGKILL:
            killed_in.append(
                sorted(
                    p.name.partition("-")[0]
                    for p in (repository / ".build" / "shop").glob("*-*")
                    if p.suffix != ".partial"
                )
            )
        else:
            assert code == 0, builds.log.read_text()[-2000:]
        for name in release_names(repository)[1:]:  # it was faster than the kill: let it publish again
            for path in repository.glob(f"{name}*"):
                shutil.rmtree(path)
            (repository / ".names.json").unlink(missing_ok=True)
        if len(killed_in) == KILLS:
            break
    assert len(killed_in) == KILLS
    assert len({len(stages) for stages in killed_in}) >= 2, f"all kills met the same stage: {killed_in}"
    builds.start()
    assert builds.wait() == 0, builds.log.read_text()[-2000:]
    assert_serves_r1(repository, alias)
    assert len(release_names(repository)) == 2
    sweep(repository, print, min_age_s=0)
    assert not [*repository.glob(".staging-*"), *repository.glob(".new-*")], "orphans are swept"
    assert not list((repository / ".build" / "shop").glob("*.partial"))


def wait_for(found, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not found():
        assert time.monotonic() < deadline, "the build never came to publishing"
        time.sleep(0.002)


KILLED_AT_EACH_RENAME = """\
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from ensemble.release.repository import remove
from toy_repository import publish_toy
rename, repository = Path.rename, Path("repository")
for at in range(20):
    child = os.fork()
    if not child:
        done = []
        def counted(self, target):
            len(done) < at or os._exit(9)
            done.append(self)
            return rename(self, target)
        Path.rename = counted
        publish_toy(repository, "r2", Path("scratch") / str(at), padding_bytes=1000 + at)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    if (repository / "r2" / "manifest.json").exists():
        from ensemble.release.release import open_release
        open_release(repository, "r2").verify()  # there, so it must be whole
        print("whole")
        break
    if [*repository.glob("r2*")]:
        Path.rename = rename
        remove(repository, "r2")  # the cure that the next publication would tell
    print("none")
"""


def test_killed_before_any_rename_of_publishing_there_is_no_release_or_a_whole_one(tmp_path):
    """The moments that random kills would hardly ever meet: microseconds apart."""
    command = [sys.executable, "-c", KILLED_AT_EACH_RENAME, str(ROOT), str(ROOT / "tests" / "helpers")]
    done = subprocess.run(
        command, cwd=tmp_path, env=one_thread(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split().count("none") >= 8, (
        "one a member, the release's own folder, the staging folder"
    )
    assert release_names(tmp_path / "repository") == ["r2"]
    open_release(tmp_path / "repository", "r2").verify()


def build(shop: Path, repository: Path, **options) -> tuple[str, dict[str, bool]]:
    """Builds in this process -> (release, {stage: skipped})."""
    from builders.build import BuildOptions
    from builders.build import build as build_release
    from builders.presets import preset

    name, stages = build_release(
        BuildOptions(shop, repository, preset("tiny"), **options), Console(file=io.StringIO())
    )
    return name, {stage.name: stage.skipped for stage in stages.done}


@pytest.fixture(scope="module")
def warm(release_cache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(shop, repository) of a finished build, its stages with it."""
    folder = tmp_path_factory.mktemp("warm")
    source = release_cache.folder("tiny")
    shutil.copytree(
        source / "repository", folder / "repository", ignore=shutil.ignore_patterns(".lock", ".servers")
    )
    shutil.copytree(source / "shop", folder / "shop")
    return folder / "shop", folder / "repository"


FIRST = ["data", "encoders", "index", "ranker", "export", "verify"]
ALL = [*FIRST, *(f"refit_{name}" for name in FIRST)]


def test_unchanged_stages_are_skipped_and_the_release_is_the_same(warm):
    shop, repository = warm
    name, skipped = build(shop, repository)
    assert skipped == {**dict.fromkeys(ALL, True), "repository": False}
    old, new = (json.loads((repository / r / "manifest.json").read_text())["files"] for r in ("r1", name))
    same = {
        path: entry["sha256"]
        for path, entry in old.items()
        if path.endswith((".npy", ".onnx", ".faiss", ".json"))
    }
    assert same == {
        path.replace(name, "r1", 1): entry["sha256"]
        for path, entry in new.items()
        if path.endswith((".npy", ".onnx", ".faiss", ".json"))
    }
    assert active_release(repository) == "r1", "building is not activating"


def test_a_release_that_is_there_as_it_would_be_built_is_nothing_to_do(warm):
    import builders.cli.build as command

    app = typer.Typer()
    app.command()(command.build)
    arguments = [*map(str, warm[:1]), "--preset", "tiny", "--repository", str(warm[1]), "--release", "r1"]
    before = (warm[1] / "r1" / "manifest.json").read_bytes()
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert (done.exit_code, found["release"], found["was_there"]) == (0, "r1", True)
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    said = " ".join(done.output.split())
    assert f"r1 of {warm[1]} was there already, just as it was built: nothing to do; activate" in said
    assert (warm[1] / "r1" / "manifest.json").read_bytes() == before


def test_a_changed_option_or_file_runs_its_stage_and_those_behind_it(warm, tmp_path):
    """Keys only: what each stage would do is replaced by nothing."""
    from builders.stages import Stage, Stages

    ran: list[str] = []

    def stages(options: dict[str, object]) -> list[str]:
        ran.clear()
        each = Stages(tmp_path, Console(file=io.StringIO()))
        each.run(Stage("data", lambda *to: ran.append("data"), options.get("data")))
        each.run(Stage("encoders", lambda *to: ran.append("encoders"), options.get("encoders"), ("data",)))
        each.run(Stage("index", lambda *to: ran.append("index"), None, ("encoders",)))
        each.run(Stage("repository", lambda *to: ran.append("repository"), None, ("index",), always=True))
        return list(ran)

    assert stages({}) == ["data", "encoders", "index", "repository"]
    assert stages({}) == ["repository"]
    assert stages({"encoders": 1}) == ["encoders", "index", "repository"]
    assert stages({"data": [1]}) == ["data", "encoders", "index", "repository"]
    assert stages({}) == ["repository"], "earlier ones are still there"


def test_a_stage_that_fails_leaves_nothing_to_be_taken_for_done(tmp_path):
    from builders.stages import Stage, Stages

    def fail(inputs: object, options: object, folder: Path, progress: object) -> None:
        (folder / "half").touch()
        raise InvalidInput("no")

    for _ in range(2):
        with pytest.raises(InvalidInput):
            Stages(tmp_path, Console(file=io.StringIO())).run(Stage("data", fail))
    done = Stages(tmp_path, Console(file=io.StringIO())).run(Stage("data", lambda *to: None))
    assert done.skipped is False
    assert {path.name for path in tmp_path.iterdir()} == {done.folder.name, "seconds.json"}


def test_two_builds_at_once_run_each_stage_once_and_make_two_releases(small_shop, tmp_path):
    light_models.write_light_models(tmp_path)
    command = [sys.executable, "-m", "peregrine", "build", str(small_shop), "--preset", "tiny", "--json"]
    command += ["--repository", str(tmp_path / "repository"), *light_models.OPTIONS]
    environment = one_thread(PYTHONPATH=str(ROOT))
    builds = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = []
    for process in builds:
        out, err = process.communicate()
        assert process.returncode == 0, err[-2000:]
        results.append(json.loads(out))
    assert {result["release"] for result in results} == {"r1", "r2"}
    skipped = [{s["stage"]: s["skipped"] for s in result["stages"]} for result in results]
    assert [sum(one[name] for one in skipped) for name in ALL] == [1] * len(ALL)
    for name in ("r1", "r2"):
        open_release(tmp_path / "repository", name).verify()


# --- one's own models


OWN = """\
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self, schema):
        super().__init__()
        self.sizes, self.tasks = schema.sizes, len(schema.tasks)
        self.scale = nn.Parameter(torch.ones(()))

class Good(Base):
    def forward(self, history_embeddings, history_mask, user_codes, user_values):
        mask = history_mask.unsqueeze(-1).float()
        return self.scale * ((history_embeddings * mask).sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1)

class OtherName(Base):
    def forward(self, history, history_mask, user_codes, user_values):
        return history

class Missing(Base):
    def forward(self, history_embeddings, history_mask, user_codes):
        return history_embeddings[:, :1]

class OtherShape(Base):
    def forward(self, history_embeddings, history_mask, user_codes, user_values):
        return history_embeddings[:, 0]

class OtherDtype(Base):
    def forward(self, history_embeddings, history_mask, user_codes, user_values):
        return history_embeddings[:, :1].double()

class Two(Base):
    def forward(self, history_embeddings, history_mask, user_codes, user_values):
        return history_embeddings[:, :1], history_mask

class Fails(Base):
    def forward(self, history_embeddings, history_mask, user_codes, user_values):
        return history_embeddings @ user_values

class NoModule:
    def __init__(self, schema):
        pass

class GoodRanker(Base):
    def forward(
        self, history_features, history_mask, user_codes, user_values, user_features, user_state,
        candidate_features, candidate_state, candidate_scores,
    ):
        return torch.sigmoid(self.scale * candidate_scores[..., 2:] - 3).expand(-1, -1, self.tasks)

class RankerWithoutScores(Base):
    def forward(
        self, history_features, history_mask, user_codes, user_values, user_features, user_state,
        candidate_features, candidate_state
    ):
        return candidate_features[..., : self.tasks]
"""
WANTED = (
    "the contract wants history_embeddings [B, H, D] float32, history_mask [B, H] bool, "
    "user_codes [B, C] int32, user_values [B, R] float32, in this order"
)
REFUSED = [
    (
        "user_encoder",
        "OtherName",
        f"forward(history, history_mask, user_codes, user_values) differs at history_embeddings; {WANTED}",
    ),
    (
        "user_encoder",
        "Missing",
        f"forward(history_embeddings, history_mask, user_codes) differs at user_values; {WANTED}",
    ),
    (
        "user_encoder",
        "OtherShape",
        "gives [3, 32] torch.float32 for user_embeddings [B, M, D] float32; the contract wants [3, 1, 32] "
        "float32",
    ),
    (
        "user_encoder",
        "OtherDtype",
        "gives [3, 1, 32] torch.float64 for user_embeddings [B, M, D] float32; the contract wants [3, 1, "
        "32] float32",
    ),
    ("user_encoder", "Two", "gives 2 tensors; the contract wants user_embeddings [B, M, D] float32"),
    ("user_encoder", "Fails", "forward fails on tensors of the contract: RuntimeError: "),
    ("user_encoder", "NoModule", "NoModule(schema) gives a NoModule, not a torch.nn.Module"),
    (
        "user_encoder",
        "Nowhere",
        "cannot import it (module 'own_models' has no attribute 'Nowhere'); give MODULE:CLASS, with MODULE "
        "importable from ",
    ),
    (
        "ranker",
        "RankerWithoutScores",
        "differs at candidate_scores; the contract wants history_features [B, H, F] float32, ",
    ),
]


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield "own_models"
    sys.modules.pop("own_models", None)


@pytest.mark.parametrize(("model", "kind", "text"), REFUSED, ids=[kind for _, kind, _ in REFUSED])
def test_an_own_model_with_another_signature_is_refused_with_the_tensors_named(
    own_models, tiny_release, model, kind, text
):
    from builders.own_model import own_model

    with pytest.raises(InvalidInput) as caught:
        own_model(f"{own_models}:{kind}", tiny_release.schema, tiny_release.pipeline.model(model))
    assert str(caught.value).startswith(f"--{model.replace('_', '-')} own_models:{kind}: ")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_own_models_that_fit_are_taken(own_models, tiny_release):
    from builders.own_model import own_model

    for model, kind in (("user_encoder", "Good"), ("ranker", "GoodRanker")):
        module = own_model(f"{own_models}:{kind}", tiny_release.schema, tiny_release.pipeline.model(model))
        assert type(module).__name__ == kind


def test_a_wrong_own_model_stops_the_build_before_it_trains(own_models, warm):
    shop, repository = warm
    before = release_names(repository)
    with pytest.raises(InvalidInput, match=r"^--ranker own_models:RankerWithoutScores: "):
        build(shop, repository, ranker="own_models:RankerWithoutScores")
    assert release_names(repository) == before


def test_a_build_warns_at_once_of_a_name_that_is_given(warm):
    from builders.build import BuildOptions
    from builders.build import build as build_release
    from builders.presets import preset

    shop, repository = warm
    said = io.StringIO()
    build_release(BuildOptions(shop, repository, preset("tiny"), release="r1"), Console(file=said))
    assert said.getvalue().startswith("warning: release name r1 is given already: ")


def test_a_name_that_cannot_be_given_stops_the_build_before_it_reads_anything(tmp_path):
    with pytest.raises(InvalidInput, match=r"^release name 'R1': use lower-case letters"):
        build(tmp_path / "no shop", tmp_path / "models", release="R1")
    assert not (tmp_path / "models").exists()


def test_own_models_are_built_into_a_release_that_answers(own_models, small_shop, tmp_path):
    """Both at once: trained, exported, indexed, verified, and asked."""
    from ensemble.local import LocalPipeline

    name, _ = build(
        small_shop, tmp_path / "repository", user_encoder="own_models:Good", ranker="own_models:GoodRanker"
    )
    pipeline = LocalPipeline(open_served(tmp_path / "repository", name))
    answer = pipeline.recommend(pipeline.release.user_ids.sorted_ids[:5].tolist())
    assert (answer["item_ids"] != b"").all()
