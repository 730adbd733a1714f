"""Each log line that a request causes names its release and its id, and no line who asked for what.

A fault is planted in a step of a release that a real server serves: one user is more than it can do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from reading import wait_until
from shops import private_copy

from clients import Client
from clients.errors import ServerFault
from ensemble.contract import Degraded
from ensemble.errors import InvalidArgument, ServerError
from ensemble.progress import log_of
from ensemble.release import foreign
from ensemble.release.files import file_sha256
from ensemble.release.manifest import sealed
from ensemble.release.repository import MODEL_PY
from ensemble.request_log import RequestLog, words_of
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import serve

USER, LATE_USER, ITEM = "planted-user-91ac", "planted-late-77de", "planted-item-44be"
# Appended to the model.py of a step that knows who asks
FAULT = f"""

import numpy as np
_initialize = TritonPythonModel.initialize


def initialize(self, args):
    _initialize(self, args)
    run = self.step.run

    def faulty(options, **tensors):
        if (tensors["user_id"] == {USER.encode()!r}).any():
            raise ValueError("no room for " + str(tensors["user_id"].tolist()))
        outputs = run(options, **tensors)
        if "degraded" in outputs and (tensors["user_id"] == {LATE_USER.encode()!r}).any():
            outputs["degraded"] = outputs["degraded"] | {int(Degraded.FEATURES_MISSING)}
        return outputs

    self.step.run = faulty


TritonPythonModel.initialize = initialize
"""


@dataclass
class Site:
    """Where a server listens, and the lines that it has logged."""

    url: str
    step: str
    lines: list[str] = field(default_factory=list)

    def line_with(self, words: str) -> str:
        """The one line that has these words, once it is there."""
        wait_until(lambda: any(words in line for line in self.lines))
        [line] = [line for line in self.lines if words in line]
        return line


@pytest.fixture(scope="module", params=["recall", "fused"])
def site(
    request: pytest.FixtureRequest, tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("faulty")
    repository = private_copy(tiny_repository, folder / "repository")
    step = "r1_recommend" if request.param == "fused" else f"r1_{request.param}"
    code = repository / step / "1" / "model.py"
    code.unlink()
    code.write_text(MODEL_PY + FAULT)
    manifest = json.loads((repository / "r1" / "manifest.json").read_text())
    manifest["files"][f"{step}/1/model.py"]["sha256"] = file_sha256(code)
    (repository / "r1" / "manifest.json").unlink()
    (repository / "r1" / "manifest.json").write_text(sealed(manifest))
    options = ServeOptions(0, None, fused=request.param == "fused", state=folder / "state")
    lines = list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign, "_is_ours", lambda text: True)
        with serve(repository, options, lines.append) as server:
            yield Site(server.url, step, lines)


@pytest.mark.triton
def test_a_request_that_fails_is_logged_with_its_release_and_id_and_nothing_of_its_caller(site: Site) -> None:
    with Client(site.url, fallback=False) as client:
        with pytest.raises(ServerFault, match=r"ValueError.*\(request page-7\)") as caught:
            client.recommend_many([USER, "u1"], session_items=[ITEM], request_id="page-7")
        assert caught.value.request_id == "page-7"
        assert "planted" not in str(caught.value)
        with pytest.raises(ServerFault) as unnamed:
            client.recommend(USER)
    line = site.line_with("request page-7")
    assert line.startswith(f"ERROR: release r1, request page-7: model {site.step}: ValueError at ")
    assert f"request {unnamed.value.request_id}:" in site.line_with(unnamed.value.request_id)
    assert "planted" not in "\n".join(site.lines)


@pytest.mark.triton
def test_what_a_caller_asks_wrongly_is_told_to_the_caller_alone(site: Site) -> None:
    with Client(site.url, fallback=False) as client:
        for options in ({"top_k": 0}, {"weights": {USER: 1.0}}):
            with pytest.raises(InvalidArgument):
                client.recommend("u1", request_id="page-8", **options)  # type: ignore[arg-type]
    assert "page-8" not in "\n".join(site.lines)


@pytest.mark.triton
def test_an_answer_that_lacks_something_is_logged_with_its_release_and_id(site: Site) -> None:
    if not site.step.endswith("recommend"):
        pytest.skip("the step of this server that is touched gives no answer")
    with Client(site.url, fallback=False) as client:
        assert client.recommend(LATE_USER, request_id="page-9").degraded & Degraded.FEATURES_MISSING
    assert site.line_with("page-9") == (
        "WARNING: release r1, request page-9: model r1_recommend: answered, degraded: features_missing"
    )
    assert "planted" not in "\n".join(site.lines)


def test_lines_of_a_second_are_bounded_and_the_rest_is_counted() -> None:
    now, lines = [0.0], list[str]()
    log = RequestLog("r1_recall", lines.append, lambda: now[0])
    log.failed("r1", [f"id{number}" for number in range(25)], ServerError("Redis\nis away"))
    assert len(lines) == 10
    now[0] = 1.5
    log.failed("r1", ["last"], ServerError("Redis is away"))
    assert lines[-1] == (
        "ERROR: release r1, request last: model r1_recall: Redis is away "
        "(and 15 more requests since the line before)\n"
    )
    assert "request id0: model r1_recall: Redis is away\n" in lines[0]


@pytest.mark.parametrize(("bits", "is_said"), [(0, False), (Degraded.UNKNOWN_USER, False), (2 | 1, True)])
def test_only_what_the_server_lacks_is_said(bits: int, is_said: bool) -> None:
    lines = list[str]()
    RequestLog("m", lines.append).answered("r1", "", np.array([[0], [bits]]))
    assert lines == (
        ["WARNING: release r1, request -: model m: answered, degraded: features_stale\n"] * is_said
    )


def test_an_id_cannot_break_a_line_and_an_exceptions_text_is_not_told() -> None:
    lines = list[str]()
    RequestLog("m", lines.append).failed("r1", ["a\nERROR: b" * 20], KeyError(USER))
    assert lines == [f"ERROR: release r1, request {('a?ERROR:?b' * 20)[:64]}: model m: KeyError\n"]
    assert words_of(InvalidArgument(f"user {USER}")) == "InvalidArgument"


def test_as_json_release_and_id_are_fields(capsys: pytest.CaptureFixture[str]) -> None:
    log_of(True)("ERROR: release r1, request page-7: model m: KeyError")
    said = json.loads(capsys.readouterr().err)
    assert (said["level"], said["release"], said["request"]) == ("error", "r1", "page-7")
    assert said["message"] == "model m: KeyError"
