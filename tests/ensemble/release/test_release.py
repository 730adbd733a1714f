"""A release is what its manifest says, or it is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from shops import private_copy

from ensemble.errors import ReleaseError
from ensemble.release.manifest import content_id, sealed
from ensemble.release.release import active_release, open_release
from ensemble.steps.served import open_served

MUTATIONS = 60
FLIPS = 200


@pytest.fixture
def repository(tiny_repository: Path, tmp_path: Path) -> Path:
    return private_copy(tiny_repository, tmp_path / "repository")


def files_of(repository: Path) -> list[str]:
    return sorted(json.loads((repository / "r1" / "manifest.json").read_text())["files"])


def test_an_unchanged_release_verifies(tiny_release):
    tiny_release.verify()


def test_manifest_names_every_file_of_the_release(tiny_repository):
    there = {str(p.relative_to(tiny_repository)) for p in tiny_repository.rglob("*") if p.is_file()}
    ours = {name for name in there if name.split("/")[0] == "r1" or name.startswith("r1_")}
    unlisted = ours - set(files_of(tiny_repository)) - {"r1/manifest.json"}
    assert {Path(name).name for name in unlisted} <= {"__pycache__"}  # the empty file that keeps bytecode out


def test_every_mutation_is_refused(repository):
    """Bit flips, truncations, zeroed pieces, exchanged files: all refused, each with the file's name."""
    rng = np.random.default_rng(0)
    files = files_of(repository)
    for _ in range(MUTATIONS):
        path = repository / files[rng.integers(len(files))]
        before = path.read_bytes()
        path.write_bytes(mutated(rng, before))
        with pytest.raises(ReleaseError) as caught:
            open_release(repository, "r1").verify()
        name = path.relative_to(repository)
        assert (
            str(caught.value)
            == f"manifest: sha256 mismatch {name}; release r1 was changed; activate another release or "
            "build again"
        )
        path.write_bytes(before)
    open_release(repository, "r1").verify()


def mutated(rng: np.random.Generator, content: bytes) -> bytes:
    out, place = bytearray(content), int(rng.integers(max(1, len(content))))
    match rng.integers(4):
        case 0:
            out[place] ^= 1 << int(rng.integers(8))
        case 1:
            del out[place:]
        case 2:
            out[place:place] = b"\0"
        case _:
            out[place : place + 4096] = bytes(b ^ 0xFF for b in out[place : place + 4096])
    return bytes(out)


def test_a_missing_file_is_refused(repository):
    for name in files_of(repository)[::5]:
        content = (repository / name).read_bytes()
        (repository / name).unlink()
        with pytest.raises(ReleaseError) as caught:
            open_release(repository, "r1").verify()
        assert name in str(caught.value)
        assert "No such file" in str(caught.value)
        (repository / name).write_bytes(content)


def test_two_files_exchanged_are_refused(repository):
    first, second = repository / "r1_ranker/1/model.onnx", repository / "r1_user_encoder/1/model.onnx"
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(ReleaseError, match=r"sha256 mismatch r1_ranker/1/model.onnx"):
        open_release(repository, "r1").verify()


def test_a_step_refuses_changed_files_before_it_opens_them(repository):
    from ensemble.local import LocalPipeline

    (repository / "r1" / "index.faiss").write_bytes(b"not an index")
    with pytest.raises(ReleaseError, match=r"^manifest: sha256 mismatch r1/index.faiss; "):
        LocalPipeline(open_served(repository, "r1"))


def test_an_absent_release_names_the_way_to_what_there_is(repository):
    with pytest.raises(ReleaseError) as caught:
        open_release(repository, "r9")
    path = repository / "r9" / "manifest.json"
    assert (
        str(caught.value)
        == f"no release 'r9' in {repository}: {path} does not exist; `peregrine release list` shows what "
        "there is"
    )


def test_half_a_release_does_not_exist(repository):
    (repository / "r1" / "manifest.json").unlink()
    with pytest.raises(ReleaseError, match=r"manifest\.json does not exist"):
        open_release(repository, "r1")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 2}', '{"format": 2, "files": []}', "\0\0"]
)
def test_a_manifest_that_says_nothing_is_refused(repository, text):
    (repository / "r1" / "manifest.json").write_text(text)
    with pytest.raises(ReleaseError, match=r"manifest"):
        open_release(repository, "r1").verify()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
def test_a_changed_schema_is_refused_before_it_is_read(repository, text):
    (repository / "r1" / "schema.json").write_text(text)
    with pytest.raises(ReleaseError, match=r"sha256 mismatch r1/schema.json"):
        open_release(repository, "r1")


def test_a_release_of_another_contract_is_refused(repository):
    path = repository / "r1" / "manifest.json"
    path.write_text(sealed({**json.loads(path.read_text()), "contract": "0" * 16}))
    with pytest.raises(ReleaseError) as caught:
        open_release(repository, "r1")
    assert (
        str(caught.value)
        == "release r1 was built for another contract (tensors or steps differ); build it again with this "
        "Peregrine"
    )


def test_without_a_route_the_active_release_stands_in_the_alias(repository):
    (repository / ".route.json").unlink(missing_ok=True)
    assert active_release(repository) == "r1"
    alias = repository / "recommend" / "config.pbtxt"
    alias.write_text("name: 'recommend'")
    with pytest.raises(ReleaseError) as caught:
        active_release(repository)
    assert str(caught.value) == f"{alias} names no release; activate one: peregrine release activate NAME"
    alias.unlink()
    assert active_release(repository) is None


def test_every_bit_of_the_manifest_counts(repository, rng):
    path = repository / "r1" / "manifest.json"
    text = path.read_bytes()
    manifest = json.loads(text)
    assert (manifest["id"], list(manifest)[-1]) == (open_release(repository, "r1").id, "digest")
    for place in [*rng.integers(len(text), size=FLIPS), *range(len(text) - 100, len(text))]:
        changed = bytearray(text)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        with pytest.raises(ReleaseError, match=r"manifest\.json"):
            open_release(repository, "r1")
    del manifest["files"]["r1/popular.npy"]
    for other in (json.dumps(manifest), text.decode().rstrip(), text.decode() + "\n"):
        path.write_text(other)
        with pytest.raises(ReleaseError, match=r"was changed: it does not fit its own digest; build the"):
            open_release(repository, "r1")
    path.write_text(sealed(manifest).replace(content_id(manifest), "0" * 16))
    with pytest.raises(ReleaseError, match="was changed"):
        open_release(repository, "r1")


def test_a_manifest_of_an_earlier_format_says_so(repository):
    path = repository / "r1" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    with pytest.raises(
        ReleaseError, match="format 1 is not 2, which this Peregrine reads; build the release"
    ):
        open_release(repository, "r1")


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("r1_reranking/2/model.py", "r1_reranking/2/"),  # Triton would run it: the highest version is served
        ("r1_ranker/1/helper.py", "r1_ranker/1/helper.py"),
        ("r1_ranker/1/model.plan", "r1_ranker/1/model.plan"),
        ("r1_recommend/configs/tensorrt.pbtxt", "r1_recommend/configs/tensorrt.pbtxt"),
        ("r1/recall.json.bak", "r1/recall.json.bak"),
        ("r1_ranker/1/__pycache__/model.cpython-311.pyc", "r1_ranker/1/__pycache__/"),
    ],
)
def test_what_the_manifest_does_not_list_is_refused(repository, path, named):
    path = repository / path
    if path.parent.is_file():
        path.parent.unlink()  # the empty file that keeps bytecode out
    path.parent.mkdir(exist_ok=True)
    path.write_text("raise SystemExit")
    with pytest.raises(ReleaseError) as caught:
        open_release(repository, "r1").verify()
    assert str(caught.value) == (
        f"manifest: {named} is not a file of release r1, yet it lies in its folders; remove "
        f"{repository / named}, or build again"
    )


def test_a_link_to_a_folder_and_a_full_bytecode_file_are_refused(repository):
    (repository / "r1_ranker" / "2").symlink_to(repository / "r1_ranker" / "1")
    with pytest.raises(ReleaseError, match=r"manifest: r1_ranker/2 is not a file of release r1"):
        open_release(repository, "r1").verify()
    (repository / "r1_ranker" / "2").unlink()
    (repository / "r1_plans").mkdir()  # plans, and other people's models, are not its own
    (repository / "r1_ranker_of_somebody").mkdir()
    open_release(repository, "r1").verify()
    (repository / "r1_ranker" / "1" / "__pycache__").write_text("code")
    with pytest.raises(ReleaseError, match=r"r1_ranker/1/__pycache__ is not a file"):
        open_release(repository, "r1").verify()
