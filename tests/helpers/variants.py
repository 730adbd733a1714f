"""Releases made of another one's files, under another name, whole, and with whatever fault a test wants."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from builders.publish.stage import publish
from builders.publish.triton_config import write_members
from ensemble import contract
from ensemble.release.release import open_release
from ensemble.release.repository import ALIAS_FILE
from ensemble.server.control import Control
from ensemble.server.running import running_server

OUTPUT = "candidate_probabilities"
Change = Callable[[Path, dict[str, Path]], None]


def publish_variant(
    repository: Path,
    source: str,
    name: str,
    scratch: Path,
    change: Change = lambda own, members: None,
    origin: Path | None = None,
) -> None:
    """Publishes `name`, made of the files of release `source`, which may be another repository's, `origin`.

    `change` is called with its own folder and {model: its folder} before.
    """
    origin = origin or repository
    release = open_release(origin, source)
    schema, folder = release.schema, scratch / f"variant-{name}"
    members = write_members(contract.pipelines(schema), contract.beside(schema), name, folder)
    for model, member in members.items():
        for engine in (origin / f"{source}_{model}" / "1").glob("*.onnx"):
            shutil.copy(engine, member / "1")
    for path in release.path.iterdir():
        if path.name != "manifest.json" and not path.name.endswith(ALIAS_FILE):
            shutil.copy(path, folder / name)
    change(folder / name, members)
    manifest = {key: release.manifest[key] for key in ("shop", "preset", "seed", "contract", "report")}
    publish(repository, name, members, folder / name, manifest)


def ranker(edit: Callable[[onnx.GraphProto], None]) -> Change:
    """Makes a change of the ranker's graph: `edit` appends nodes from "raw" to the probabilities."""

    def change(own: Path, members: dict[str, Path]) -> None:
        path = members["ranker"] / "1" / "model.onnx"
        model = onnx.load(path)
        for node in model.graph.node:
            node.output[:] = ["raw" if name == OUTPUT else name for name in node.output]
            node.input[:] = ["raw" if name == OUTPUT else name for name in node.input]
        edit(model.graph)
        onnx.save(model, path)

    return change


def add(graph: onnx.GraphProto, operator: str, *inputs: str, output: str = OUTPUT, **values: object) -> None:
    """Appends a node, and the constants that it takes."""
    for name, value in values.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    graph.node.append(helper.make_node(operator, [*inputs, *values], [output]))


def gives_nan(graph: onnx.GraphProto) -> None:
    add(graph, "Add", "raw", nan=np.float32("nan"))


def gives_constants(graph: onnx.GraphProto) -> None:
    add(graph, "Mul", "raw", output="zero", nothing=np.float32(0))
    add(graph, "Add", "zero", half=np.float32(0.5))


def gives_the_reverse(graph: onnx.GraphProto) -> None:
    add(graph, "Mul", "raw", output="negative", minus=np.float32(-1))
    add(graph, "Add", "negative", one=np.float32(1))


def gives_another_shape(graph: onnx.GraphProto) -> None:
    add(graph, "Concat", "raw", "raw")
    graph.node[-1].attribute.append(helper.make_attribute("axis", 2))
    graph.output[0].type.tensor_type.shape.dim[2].dim_value *= 2


def takes_much_memory(graph: onnx.GraphProto) -> None:
    """40 GB of ones, made when it is asked, then summed."""
    add(graph, "Shape", "raw", output="shape")
    add(graph, "Slice", "shape", output="batch", start=np.array([0]), end=np.array([1]))
    add(graph, "Mul", "batch", output="zero", nothing=np.array([0]))
    add(graph, "Add", "zero", output="many", count=np.array([10_000_000_000]))
    add(graph, "ConstantOfShape", "many", output="lots")
    add(graph, "ReduceSum", "lots", output="sum")
    graph.node[-1].attribute.append(helper.make_attribute("keepdims", 0))
    add(graph, "Add", "raw", "sum")


def never_ends(graph: onnx.GraphProto) -> None:
    """A loop of 2 ** 62 rounds around the probabilities."""
    graph.initializer.append(numpy_helper.from_array(np.array(2**62), "rounds"))
    _loop(graph)


FEW = 4  # a release's own users come 8 at a time, callers' mostly alone


def fails_for_few(graph: onnx.GraphProto) -> None:
    """Reads beyond the end of a table when fewer than FEW users come at once."""
    _is_for_few(graph)
    add(graph, "Gather", "table", "once", output="nothing")
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "table"))
    add(graph, "Add", "raw", "nothing")


def hangs_for_few(graph: onnx.GraphProto) -> None:
    """Loops for ever when fewer than FEW users come at once."""
    _is_for_few(graph)
    add(graph, "Mul", "once", output="rounds", many=np.array(2**62))
    _loop(graph)


def _is_for_few(graph: onnx.GraphProto) -> None:
    """Gives 1 as "once" when fewer than FEW users come of whom one has a history, as nobody has whom a step
    is warmed with; else 0."""
    add(graph, "Shape", "raw", output="shape")
    add(graph, "Gather", "shape", output="batch", first=np.array(0))
    add(graph, "Less", "batch", output="few", fewest=np.array(FEW))
    add(graph, "Cast", "history_mask", output="marks")
    graph.node[-1].attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    add(graph, "ReduceMax", "marks", output="largest")
    graph.node[-1].attribute.append(helper.make_attribute("keepdims", 0))
    add(graph, "Greater", "largest", output="real", unmarked=np.float32(0))
    add(graph, "And", "few", "real", output="both")
    add(graph, "Cast", "both", output="once")
    graph.node[-1].attribute.append(helper.make_attribute("to", TensorProto.INT64))


def _loop(graph: onnx.GraphProto) -> None:
    """As many rounds as "rounds" says around the probabilities."""

    def value(name: str, kind: int, shape: list[int] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["goes_on"]),
            helper.make_node("Identity", ["given"], ["kept"]),
        ],
        "round",
        [
            value("round", TensorProto.INT64, []),
            value("going", TensorProto.BOOL, []),
            value("given", 1, None),
        ],
        [value("goes_on", TensorProto.BOOL, []), value("kept", 1, None)],
    )
    graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    graph.node.append(helper.make_node("Loop", ["rounds", "always", "raw"], [OUTPUT], body=body))


def answering(repository: Path) -> str:
    """The release that the server answers with; nothing else is loaded."""
    with Control(running_server(repository)) as control:
        (release,) = {*control.ask("recommend", ["u"], {"top_k": 3})["release"].ravel().tolist()}
        assert {model.partition("_")[0] for model in control.models()} == {"recommend", release.decode()}
    return release.decode()
