"""Writes config.pbtxt from specs by a typed ModelConfig; nothing and nobody else writes or edits one.

Every configuration runs on any Triton with the Python backend, from 2.51 on: fields that 2.51 rejects
(ensemble_scheduling.max_inflight_requests, model_metrics) are not written. Another way to run a model gets a
second file, <model>/configs/<name>.pbtxt, chosen with --model-config-name: fused.pbtxt of the release's
ensemble runs all steps in one process; tensorrt.pbtxt of an engine, for Triton's native TensorRT backend,
lies beside its plan (ensemble/engines/plans.py), so that a model without a plan falls back to config.pbtxt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.model_config_pb2 import ModelConfig

from ensemble.engines.plans import PLAN_FILE, batch_sizes
from ensemble.release.repository import FUSED, MODEL_PY, alias_file
from ensemble.spec import Dtype, ModelSpec, PipelineSpec, TensorSpec

_TYPES: Mapping[Dtype, str] = {
    "float32": "TYPE_FP32",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
    "bytes": "TYPE_STRING",
}


def member_config(spec: ModelSpec, release: str, max_batch: int) -> ModelConfig:
    """Configures one step of a release, run by the Python backend."""
    config = _config(f"{release}_{spec.name}", spec.inputs, spec.outputs, max_batch, release)
    config.backend = "python"
    config.parameters["step"].string_value = spec.name
    # No delay: five steps would add five of them. No queue policy: it loses requests on 2.51 and collapses
    # goodput.
    config.dynamic_batching.max_queue_delay_microseconds = 0
    config.dynamic_batching.SetInParent()
    config.instance_group.add(count=spec.instances, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    return config


def ensemble_config(spec: PipelineSpec, release: str) -> ModelConfig:
    """Configures the release's ensemble: every model of the pipeline, wired by names alone."""
    config = _config(f"{release}_{spec.name}", spec.inputs, spec.outputs, spec.max_batch, release)
    config.platform = "ensemble"
    for model in spec.models:
        _add_step(config, f"{release}_{model.name}", model.inputs, model.outputs)
    return config


def alias_config(spec: PipelineSpec, release: str) -> ModelConfig:
    """Configures the name that clients call: one step, the release's ensemble."""
    config = _config(spec.name, spec.inputs, spec.outputs, spec.max_batch, release)
    config.platform = "ensemble"
    _add_step(config, f"{release}_{spec.name}", spec.inputs, spec.outputs)
    return config


def tensorrt_config(spec: ModelSpec, release: str, max_batch: int) -> ModelConfig:
    """Configures an engine for Triton's TensorRT backend: plan, CUDA graphs, real samples to warm up."""
    config = _config(f"{release}_{spec.name}", spec.inputs, spec.outputs, max_batch, release)
    config.platform = "tensorrt_plan"
    config.default_model_filename = PLAN_FILE
    # as in member_config, and no preferred sizes: they would wait for more
    config.dynamic_batching.max_queue_delay_microseconds = 0
    config.dynamic_batching.SetInParent()
    # On GPU 0, which is the one that `compile` builds for; without it Triton takes all there are, whatever
    # they are.
    config.instance_group.add(
        count=spec.instances, kind=model_config_pb2.ModelInstanceGroup.KIND_GPU, gpus=[0], profile=["0"]
    )
    config.optimization.cuda.graphs = True
    for size in batch_sizes(max_batch):
        _add_graph(config, spec, size)
        _add_warmup(config, spec, size)
    return config


def _add_graph(config: ModelConfig, spec: ModelSpec, size: int) -> None:
    """Records one CUDA graph without a lower bound: below it a graph would read rows that nobody wrote."""
    graph = config.optimization.cuda.graph_spec.add(batch_size=size)
    for tensor in spec.inputs:
        graph.input[tensor.name].dim.extend(_dims(tensor))


def _add_warmup(config: ModelConfig, spec: ModelSpec, size: int) -> None:
    """Warms up at this batch size on one real user's tensors, which lie in warmup/<tensor>."""
    warmup = config.model_warmup.add(name=f"batch {size}", batch_size=size)
    for tensor in spec.inputs:
        sample = warmup.inputs[tensor.name]
        sample.data_type = model_config_pb2.DataType.Value(_TYPES[tensor.dtype])
        sample.dims.extend(_dims(tensor))
        sample.input_data_file = tensor.name


def config_text(config: ModelConfig) -> str:
    """Gives config.pbtxt's text; max_batch_size is checked, because text_format drops a 0."""
    if config.max_batch_size < 1:
        raise ValueError(
            f"{config.name}: max_batch_size is {config.max_batch_size}; every model of ours batches"
        )
    return text_format.MessageToString(config)


def write_members(
    pipelines: Sequence[PipelineSpec], extra: Sequence[ModelSpec], release: str, folder: Path
) -> dict[str, Path]:
    """Writes each member's config.pbtxt and model.py, and the ensembles', under `folder`; returns {model
    name: its folder}.

    `extra` are members outside the ensembles (item_encoder). Engines' model.onnx go beside their model.py;
    the folder named by the release gets the aliases. All is then what repository.publish takes.
    """
    models = {spec.name: spec for pipeline in pipelines for spec in pipeline.models}
    models |= {spec.name: spec for spec in extra}
    folders = {
        name: folder / f"{release}_{name}" for name in (*models, *(pipeline.name for pipeline in pipelines))
    }
    for spec in models.values():
        _write(folders[spec.name], member_config(spec, release, pipelines[0].max_batch))
        (folders[spec.name] / "1" / "model.py").write_text(MODEL_PY, encoding="utf-8")
    (folder / release).mkdir(exist_ok=True)
    for pipeline in pipelines:
        _write(folders[pipeline.name], ensemble_config(pipeline, release))
        _write_fused(folders[pipeline.name], member_config(pipeline.fused, release, pipeline.max_batch))
        alias = config_text(alias_config(pipeline, release))
        (folder / release / alias_file(pipeline.name)).write_text(alias, encoding="utf-8")
    return folders


def _write(folder: Path, config: ModelConfig) -> None:
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(config_text(config), encoding="utf-8")


def _write_fused(folder: Path, config: ModelConfig) -> None:
    """Configures, beside the ensemble, the same model as one Python process (`peregrine serve --fused`)."""
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / f"{FUSED}.pbtxt").write_text(config_text(config), encoding="utf-8")
    (folder / "1" / "model.py").write_text(MODEL_PY, encoding="utf-8")


def _config(
    name: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], max_batch: int, release: str
) -> ModelConfig:
    config = ModelConfig(name=name, max_batch_size=max_batch)
    for tensor in inputs:
        config.input.add(name=tensor.name, data_type=_TYPES[tensor.dtype], dims=_dims(tensor))
    for tensor in outputs:
        config.output.add(name=tensor.name, data_type=_TYPES[tensor.dtype], dims=_dims(tensor))
    config.parameters["release"].string_value = release
    return config


def _dims(tensor: TensorSpec) -> list[int]:
    return [-1 if size is None else size for size in tensor.dims]


def _add_step(
    config: ModelConfig, model: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]
) -> None:
    step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
    for tensor in inputs:
        step.input_map[tensor.name] = tensor.name
    for tensor in outputs:
        step.output_map[tensor.name] = tensor.name
