"""A release brings no code: neither in a file nor by a word of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from shops import private_copy
from toy_repository import MODEL_PY as TOY
from toy_repository import publish_toy
from tritonclient.grpc.model_config_pb2 import ModelConfig
from variants import publish_variant

from clients.operations import releases
from ensemble.errors import ReleaseError
from ensemble.release import foreign
from ensemble.release.release import active_release, open_release
from ensemble.release.repository import ALIAS_FILE

FILES = [
    "1/model.py",
    "1/helper.py",
    "1/library.so",
    "triton_python_backend_stub",
    "1/libtriton_x.so",
    "labels.txt",
]
TEXTS = {
    'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "x" } }': "parameter EXECUTION_ENV_PATH",
    'backend: "foreign"': "backend 'foreign'",
    'platform: "pytorch_libtorch"': "backend ",
    'runtime: "libx.so"': "runtime",
    'model_operations { op_library_filename: "/x.so" }': "model_operations",
    'model_repository_agents { agents { name: "x" } }': "model_repository_agents",
    'default_model_filename: "other.py"': "default_model_filename 'other.py'",
    'optimization { execution_accelerators { gpu_execution_accelerator { name: "x" } } }': (
        "optimization.execution_accelerators"
    ),
    'name: "r9_ranker"': "name 'r9_ranker' of release 'r2'",
    'ensemble_scheduling { step { model_name: "r1_ranker" } }': "step 'r1_ranker'",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    publish_toy(folder / "models", "r2", folder)
    return folder / "models"


@pytest.fixture(scope="module")
def repository(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return private_copy(tiny_repository, tmp_path_factory.mktemp("foreign") / "repository")


def test_what_a_build_writes_is_ours(repository):
    foreign.check_release(open_release(repository, "r1"))


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_we_do_not_write_is_refused(repository, tmp_path, file):
    name = file.translate(str.maketrans("/._", "---"))

    def bring(own: Path, members: dict[str, Path]) -> None:
        (members["ranker"] / file).write_text("print('hello')")

    publish_variant(repository, "r1", name, tmp_path, bring)
    with pytest.raises(ReleaseError) as caught:
        releases.activate(repository, name)
    assert str(caught.value) == (
        f"release {name}: {repository / f'{name}_ranker' / file} is code that Peregrine did not write; build "
        "the release again"
    )
    assert active_release(repository) == "r1"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("file", ["r2_ranker/config.pbtxt", f"r2/{ALIAS_FILE}"])
def test_a_configuration_that_runs_something_else_is_refused(toy, tmp_path, text, file):
    config = text_format.Parse((toy / file).read_text(), ModelConfig())
    config.MergeFrom(text_format.Parse(text, ModelConfig()))
    (tmp_path / "config.pbtxt").write_text(text_format.MessageToString(config))
    model = "r2_ranker" if file.startswith("r2_") else ""
    if not model and text.startswith("name"):
        return  # an alias is no model of a release
    with pytest.raises(ReleaseError) as caught:
        foreign.read_configuration(tmp_path / "config.pbtxt", model)
    assert str(caught.value).startswith(f"{tmp_path / 'config.pbtxt'}: {TEXTS[text]}")
    assert str(caught.value).endswith(", which Peregrine does not write; build the release again")


def test_a_configuration_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.pbtxt").write_text("nonsense { [")
    with pytest.raises(
        ReleaseError, match=r"config\.pbtxt is no configuration of Triton: .*build the release"
    ) as caught:
        foreign.read_configuration(tmp_path / "config.pbtxt", "r1_x")
    assert "\n" not in str(caught.value)


def test_a_model_py_of_its_own_is_read_by_nobody(tmp_path):
    (tmp_path / "model.py").write_text(TOY)
    with pytest.raises(ReleaseError, match="is code that Peregrine did not write"):
        foreign.read_code(tmp_path / "model.py")
