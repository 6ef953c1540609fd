"""Builds engines for the CPU of this machine with OpenVINO, which runs every quantized product of our graphs on integers.

It reads the same ONNX as TensorRT. Tensors that are float there stay float32: OpenVINO would compute in bfloat16 if nothing were said. An
engine is OpenVINO's compiled model; it opens with the same OpenVINO on the same model of CPU. Before it is written, its outputs are
compared with those of the ONNX.
"""

import time
from pathlib import Path
from typing import Any

import onnx
from onnx import inliner

from engine import cpu
from engine.backend import Backend, EngineError
from engine.layer_table import Layer
from engine.plan import Options, Plan
from qdbev import deployed_graph, detectors
from qdbev.config import from_dict
from qdbev.data.noise_frames import noise_frames
from qdbev.facts import Target

_SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
_NO_KERNEL = ("Const", "Input", "Output", "Reshape")
"""Kinds of nodes of OpenVINO's compiled model that compute nothing."""
_TYPES = {"i8": "INT8", "u8": "INT8", "f32": "FP32", "f16": "FP16", "bf16": "BF16", "i32": "INT32", "i64": "INT64", "boolean": "BOOL"}
"""Names of number types as layer tables have them. An activation behind a ReLU is stored as u8."""
_WEIGHT, _ADDED = ".weight.int8", ("/DequantizationMultiply", "/WithoutBiases", "/transpose_b")
"""Ending of the ONNX name of an integer weight, and endings that OpenVINO adds to the name of an ONNX node."""


def build_plan(chosen: Backend, onnx_path: Path, model: onnx.ModelProto, options: Options) -> Plan:
    """Build an engine from an ONNX. Raises EngineError if an option does not fit, or OpenVINO refuses the graph."""
    if options.compute_capabilities or options.memory_limit_mb is not None:
        raise EngineError("--compute-capability and --memory-limit are for GPUs; leave them out with --backend cpu")
    version = cpu.kernels_version()
    core = cpu.core(chosen, with_kernels=version is not None)
    graph = model if version else inliner.inline_local_functions(model)
    started = time.monotonic()
    try:
        compiled = core.compile_model(core.read_model(graph.SerializeToString()), "CPU", _SETTINGS)
        content = compiled.export_model().getvalue()
    except RuntimeError as error:
        raise EngineError(f"OpenVINO {chosen.version} built no engine from {onnx_path}: {deployed_graph.first_line(error)}") from error
    here = cpu.this_cpu()
    target = Target(compute_capabilities=None, cpu=here.name, instruction_set=here.instruction_set, cpu_kernels=version)
    table = [_layer(node) for node in compiled.get_runtime_model().get_ordered_ops() if _fact(node, "layerType") not in _NO_KERNEL]
    return Plan(content=content, table=table, target=target, build_seconds=round(time.monotonic() - started, 2))


def require_same_numbers(chosen: Backend, plan: Plan, onnx_path: Path) -> None:
    """Raise EngineError unless the engine computes what the ONNX computes in onnxruntime, on two frames of noise."""
    from export import parity
    from export.runner import OnnxRunner  # here, because rooms do not import rooms otherwise

    runner = OnnxRunner(onnx_path)
    config = from_dict(runner.seal.config)
    frames = noise_frames(config.data, config.model.num_cameras, runner.seal.facts.image_hw)
    run = cpu.Running(chosen, plan.content, plan.target, None)
    rows = parity.compare(runner, run, frames, detectors.stream(config.model), parity.SUM_ORDER_CHANGE)
    wrong = [row for row in rows if not row.passed]
    if not wrong:
        return
    here, worst = cpu.this_cpu(), min(wrong, key=lambda row: row.cosine)
    reason = ""
    if here.instruction_set in cpu.SATURATING:
        needed = ", ".join(cpu.EXACT)
        reason = f" It adds pairs of products of 8-bit numbers in 16 bits, which saturates; integers need a CPU with one of {needed}."
    raise EngineError(
        f"on this CPU ({here.name}, {here.instruction_set}) the engine does not compute what {onnx_path} computes: {worst.output} has a "
        f"cosine of {worst.cosine:.6f} to it.{reason} Run the ONNX here, or build the engine elsewhere"
    )


def _layer(node: Any) -> Layer:
    """The row of a node of OpenVINO's compiled model."""
    inputs, constants = [], []
    for port in node.inputs():
        source = port.get_source_output()
        kind = port.get_element_type().get_type_name()
        if kind != "dynamic":
            (constants if _fact(source.get_node(), "layerType") == "Const" else inputs).append(_TYPES.get(kind, kind.upper()))
    outputs = [port.get_element_type().get_type_name() for port in node.outputs()]
    return Layer(
        name=node.get_friendly_name(),
        kind=_fact(node, "layerType"),
        inputs=tuple(inputs),
        constants=tuple(constants),
        outputs=tuple(_TYPES.get(kind, kind.upper()) for kind in outputs),
        tactic=_fact(node, "primitiveType"),
        nodes=_onnx_nodes(node),
    )


def _onnx_nodes(node: Any) -> tuple[str, ...]:
    """Names of the ONNX nodes that are fused into a node. A product that OpenVINO renamed is found by the name of its weight."""
    names = _fact(node, "originalLayersNames").split(",")
    for port in node.inputs():
        source = port.get_source_output().get_node()
        names += [name for name in _fact(source, "originalLayersNames").split(",") if name.endswith(_WEIGHT)]
    found = []
    for name in names:
        for ending in (*_ADDED, _WEIGHT):
            name = name.removesuffix(ending)
        found.append(name)
    return tuple(dict.fromkeys(filter(None, found)))


def _fact(node: Any, name: str) -> str:
    """A fact that OpenVINO notes about a node of a compiled model; empty where there is none."""
    facts = node.get_rt_info()
    if name not in facts:
        return ""
    value = facts[name]
    return str(value.value if hasattr(value, "value") else value)
