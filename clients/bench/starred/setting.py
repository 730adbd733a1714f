"""Holds what a test has: a server at work, what asks it, and a second release to turn to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clients.bench.faulty_redis import FaultyRedis
from clients.bench.starred.load import Bench
from ensemble.local import LocalPipeline
from ensemble.release.canary import CANARY, canary_from_answer, read_canary
from ensemble.release.files import file_sha256
from ensemble.release.manifest import MANIFEST, sealed
from ensemble.release.release import Release, open_release
from ensemble.server.supervisor import Server
from ensemble.steps.served import open_served

RANKER = "ranker"
BAD, SECOND = "bad", "second"  # releases that tests make
_OUTPUT = "candidate_probabilities"
Edit = Callable[[Path, str], None]  # of a repository's release, by name, before it is sealed


@dataclass
class Setting:
    """Is what a test is given."""

    server: Server
    bench: Bench
    repository: Path  # that is served
    folder: Path  # to write into
    second: Callable[[], AbstractContextManager[Server]]  # starts another server of it
    is_all: bool = False
    redis: FaultyRedis | None = None

    @property
    def release(self) -> Release:
        """Opens the release that is served."""
        return open_release(self.repository, self.server.release)


def copy_release(source: Release, target: Path, name: str, *edits: Edit) -> Release:
    """Copies a release into repository `target` under another name, changes it, and seals it."""
    files = {}
    for path in source.manifest["files"]:
        folder, _, rest = path.partition("/")
        place = f"{name}{folder.removeprefix(source.name)}/{rest}"
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".pbtxt"):
            text = (source.repository / path).read_text(encoding="utf-8")
            for end in ('"', "_"):
                text = text.replace(f'"{source.name}{end}', f'"{name}{end}')
            (target / place).write_text(text, encoding="utf-8")
        else:
            shutil.copy2(source.repository / path, target / place)
        files[place] = target / place
    (target / f"{name}_recommend" / "1").mkdir(exist_ok=True)
    seal(source, target, name, files)
    for edit in edits:
        edit(target, name)
        seal(source, target, name, files)
    return open_release(target, name)


def seal(source: Release, target: Path, name: str, files: dict[str, Path]) -> None:
    """Writes the manifest of a copy of `source` for its files as they are."""
    listed = {
        place: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for place, path in files.items()
    }
    text = sealed({**source.manifest, "release": name, "files": listed})
    (target / name / MANIFEST).write_text(text, encoding="utf-8")


def _dims(target: Path, name: str) -> None:
    """Makes a release give other probabilities, and other scores with them."""
    edit_ranker(target, name, ("Mul", 0.9))


def _writes_its_lists(target: Path, name: str) -> None:
    """Writes down a release's own lists, which it is asked for before it is served."""
    release = open_served(target, name)
    known = read_canary(release.path / CANARY)
    users = [user.encode() for user in known.user_ids]
    answer = LocalPipeline(release).recommend(users, known.options)
    lists = canary_from_answer(known.top_k, known.user_ids, answer, known.time)
    (release.path / CANARY).write_text(lists.to_json(), encoding="utf-8")


ANOTHER_TASTE = (_dims, _writes_its_lists)


def edit_ranker(target: Path, name: str, *operations: tuple[str, float]) -> None:
    """Appends operations, each with a constant, to what a release's ranker gives; "Concat" gives it twice."""
    import onnx
    from onnx import helper, numpy_helper

    path = target / f"{name}_{RANKER}" / "1" / "model.onnx"
    model = onnx.load(path)
    graph = model.graph
    for node in graph.node:
        node.output[:] = ["raw" if one == _OUTPUT else one for one in node.output]
        node.input[:] = ["raw" if one == _OUTPUT else one for one in node.input]
    given = "raw"
    for number, (operator, value) in enumerate(operations):
        output = _OUTPUT if number == len(operations) - 1 else f"edited_{number}"
        if operator == "Concat":
            graph.node.append(helper.make_node(operator, [given, given], [output], axis=2))
            graph.output[0].type.tensor_type.shape.dim[2].dim_value *= 2
        else:
            constant = f"constant_{number}"
            graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), constant))
            graph.node.append(helper.make_node(operator, [given, constant], [output]))
        given = output
    onnx.save(model, path)
