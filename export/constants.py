"""Products that depend on no input, computed once here and not in every frame.

A decoder begins with constants: its object queries attend to each other, and say where they will look, before anything was seen. An
engine computes that anew in every frame, in a dozen kernels (seen in TensorRT-RTX 1.7.1).
"""

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, helper

from export.graph import Graph

PRODUCTS = ("Conv", "Gemm", "MatMul")


def fold(model: onnx.ModelProto, of: tuple[str, ...] = PRODUCTS) -> int:
    """Put constants where a network reads what nodes `of` constants lead to, in place, and return the number of such nodes that go.

    onnxruntime computes them, Q/DQ executed as it stands, so that the numbers are those of the whole graph there. Constants that no
    node `of` them made stay as they are: integer weights behind a DequantizeLinear would grow.
    """
    graph = Graph(model)
    nodes, made = _constant_nodes(graph, of)
    inside = {node.output[0] for node in nodes}
    read = {name for node in graph.proto.node if node.output[0] not in inside for name in node.input}
    wanted = sorted(made & read)
    if not wanted:
        return 0
    for name, value in zip(wanted, _computed(model, nodes, wanted), strict=True):
        graph.redirect(name, graph.add_constant(f"{graph.producers[name].name}.constant", value))
    before = _count(graph, of)
    graph.prune()
    return before - _count(graph, of)


def _constant_nodes(graph: Graph, of: tuple[str, ...]) -> tuple[list[NodeProto], set[str]]:
    """Nodes that depend on no input, in order, and those of their results that a node `of` them had a part in."""
    constant, made, nodes = {"", *graph.initializers}, set(), []
    for node in graph.proto.node:
        if node.domain or not constant.issuperset(node.input):
            continue
        nodes.append(node)
        constant.update(node.output)
        if node.op_type in of or made.intersection(node.input):
            made.update(node.output)
    return nodes, made


def _computed(model: onnx.ModelProto, nodes: list[NodeProto], wanted: list[str]) -> list[np.ndarray]:
    """Values of the tensors `wanted`, made by `nodes` from the model's constants."""
    read = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    results = [helper.make_empty_tensor_value_info(name) for name in wanted]
    part = helper.make_model(
        helper.make_graph(nodes, "constants", [], results, constants), opset_imports=model.opset_import, ir_version=model.ir_version
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(wanted, {})


def _count(graph: Graph, op_types: tuple[str, ...]) -> int:
    return sum(node.op_type in op_types for node in graph.proto.node)
