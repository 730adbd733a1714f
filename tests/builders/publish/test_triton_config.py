"""config.pbtxt says what the spec says, and only what every supported Triton accepts."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from toy_repository import SCHEMA
from tritonclient.grpc.model_config_pb2 import ModelConfig

from builders.publish.triton_config import (
    MODEL_PY,
    alias_config,
    config_text,
    ensemble_config,
    member_config,
    tensorrt_config,
    write_members,
)
from ensemble import contract
from ensemble.release.repository import ALIAS_FILE

PIPELINE = contract.recommend(SCHEMA)
TYPES = {
    "float32": "TYPE_FP32",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
    "bytes": "TYPE_STRING",
}


def tensors(config_tensors) -> list[tuple]:
    names = (
        ModelConfig.DESCRIPTOR.fields_by_name["input"]
        .message_type.fields_by_name["data_type"]
        .enum_type.values_by_number
    )
    return [(t.name, names[t.data_type].name, list(t.dims)) for t in config_tensors]


def wanted(specs) -> list[tuple]:
    return [(s.name, TYPES[s.dtype], [-1 if d is None else d for d in s.dims]) for s in specs]


@pytest.mark.parametrize(
    "spec", [*PIPELINE.models, contract.item_encoder(SCHEMA)], ids=lambda spec: spec.name
)
def test_member_config_equals_its_spec(spec):
    config = text_format.Parse(config_text(member_config(spec, "r1", PIPELINE.max_batch)), ModelConfig())
    assert config.name == f"r1_{spec.name}"
    assert tensors(config.input) == wanted(spec.inputs)
    assert tensors(config.output) == wanted(spec.outputs)
    assert config.max_batch_size == SCHEMA.sizes.max_batch
    assert [(g.count, g.kind) for g in config.instance_group] == [(spec.instances, 2)]  # 2 = KIND_CPU
    assert {key: p.string_value for key, p in config.parameters.items()} == {
        "release": "r1",
        "step": spec.name,
    }


def test_dynamic_batching_has_no_delay_and_no_queue_policy():
    config = text_format.Parse(config_text(member_config(PIPELINE.models[0], "r1", 8)), ModelConfig())
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert not config.dynamic_batching.HasField("default_queue_policy")
    assert config.dynamic_batching.priority_levels == 0


ENGINES = [*(model for model in PIPELINE.models if model.is_engine), contract.item_encoder(SCHEMA)]


@pytest.mark.parametrize("spec", ENGINES, ids=lambda spec: spec.name)
def test_tensorrt_config_equals_its_spec(spec):
    config = text_format.Parse(config_text(tensorrt_config(spec, "r1", 64)), ModelConfig())
    assert (config.name, config.platform, config.backend, config.default_model_filename) == (
        f"r1_{spec.name}",
        "tensorrt_plan",
        "",
        "model.plan",
    )
    assert (tensors(config.input), tensors(config.output)) == (wanted(spec.inputs), wanted(spec.outputs))
    assert config.max_batch_size == 64
    assert config.HasField("dynamic_batching")
    assert (
        list(config.dynamic_batching.preferred_batch_size),
        config.dynamic_batching.max_queue_delay_microseconds,
    ) == ([], 0)
    assert [(g.count, g.kind, list(g.gpus), list(g.profile)) for g in config.instance_group] == [
        (spec.instances, 1, [0], ["0"])
    ]  # 1 = KIND_GPU; on the GPU that the plan was built for, whatever others there are


@pytest.mark.parametrize("spec", ENGINES, ids=lambda spec: spec.name)
def test_cuda_graphs_and_warm_up_name_every_input_at_the_batch_sizes_that_matter(spec):
    config = tensorrt_config(spec, "r1", 64)
    dims = {t.name: list(t.dims) for t in spec.inputs}
    assert config.optimization.cuda.graphs
    graphs = config.optimization.cuda.graph_spec
    assert [graph.batch_size for graph in graphs] == [1, 8, 64]
    assert all({name: list(shape.dim) for name, shape in graph.input.items()} == dims for graph in graphs)
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 8, 64]
    for warmup in config.model_warmup:
        assert {name: list(sample.dims) for name, sample in warmup.inputs.items()} == dims
        assert all(
            sample.input_data_file == name and not sample.random_data
            for name, sample in warmup.inputs.items()
        )


def test_small_batches_get_each_cuda_graph_once():
    for most, sizes in ((1, [1]), (4, [1, 4]), (8, [1, 8])):
        assert [
            graph.batch_size for graph in tensorrt_config(ENGINES[0], "r1", most).optimization.cuda.graph_spec
        ] == sizes


def test_ensemble_is_wired_by_names_alone():
    config = ensemble_config(PIPELINE, "r1")
    assert [step.model_name for step in config.ensemble_scheduling.step] == [
        f"r1_{model.name}" for model in PIPELINE.models
    ]
    for step, model in zip(config.ensemble_scheduling.step, PIPELINE.models, strict=True):
        assert dict(step.input_map) == {t.name: t.name for t in model.inputs}
        assert dict(step.output_map) == {t.name: t.name for t in model.outputs}
        assert step.model_version == -1


def test_alias_has_one_step_and_the_pipelines_tensors():
    config = alias_config(PIPELINE, "r7")
    assert config.name == "recommend"
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["r7_recommend"]
    assert tensors(config.output) == wanted(PIPELINE.outputs)


def test_fields_that_triton_2_51_rejects_are_not_written():
    texts = [config_text(member_config(m, "r1", 8)) for m in PIPELINE.models] + [
        config_text(ensemble_config(PIPELINE, "r1"))
    ]
    assert not any("max_inflight_requests" in text or "model_metrics" in text for text in texts)


def test_a_configuration_without_batching_is_refused_because_text_format_would_drop_it():
    with pytest.raises(ValueError, match="max_batch_size is 0"):
        config_text(ModelConfig(name="x"))


def test_write_members_gives_every_member_the_same_files(tmp_path):
    members = write_members([PIPELINE], [contract.item_encoder(SCHEMA)], "r1", tmp_path)
    assert set(members) == {*(m.name for m in PIPELINE.models), "item_encoder", "recommend"}
    for name, folder in members.items():
        assert folder == tmp_path / f"r1_{name}"
        assert (folder / "config.pbtxt").exists()
        if name != "recommend":
            assert (folder / "1" / "model.py").read_text() == MODEL_PY
    assert (members["recommend"] / "1").is_dir()
    assert 'model_name: "r1_recommend"' in (tmp_path / "r1" / ALIAS_FILE).read_text()


def test_model_py_is_two_imports_in_the_order_that_puts_our_packages_first():
    lines = MODEL_PY.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("import triton_python_backend_utils")
    assert lines[1].startswith("from ensemble.python_model import PythonModel as TritonPythonModel")
