"""Computes products that depend on no input once at export instead of in every frame.

The decoder's first self-attention and its sampling offsets depend only on learned queries, so they are constant. TensorRT-RTX (1.7.1)
recomputes them in every frame, in a dozen kernels.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime

from export.graph import PRODUCTS, PassError, add_constant, remove_unused, sources


def fold_constant_products(model: ir.Model) -> int:
    """Replace the results of products that depend on no input by constants, and return how many products were removed.

    onnxruntime computes the constants, with Q/DQ executed literally, so the numbers are those of the whole graph there. Constants in which
    no product takes part stay as they are: integer weights behind a DequantizeLinear would grow.

    Raises:
        PassError: A product that depends on no input is left.
    """
    nodes, made = _constant_nodes(model.graph)
    inside = set(nodes)
    wanted = sorted((value for value in made if any(node not in inside for node, _ in value.uses())), key=lambda value: value.name)
    before = _num_products(model)
    for value, array in zip(wanted, _computed(model, wanted), strict=True):
        value.replace_all_uses_with(add_constant(model.graph, f"{value.producer().name}.constant", array))
    if wanted:
        remove_unused(model)
    depends = sources(model.graph)
    for node in model.graph:
        if node.op_type in PRODUCTS and not depends[node.outputs[0]]:
            raise PassError(f"fold_constant_products: {node.op_type} {node.name} depends on no input, but could not be computed at export")
    return before - _num_products(model)


def _constant_nodes(graph: ir.Graph) -> tuple[list[ir.Node], set[ir.Value]]:
    """Nodes of ONNX itself that depend on no input, in order, and those of their outputs that come from a product."""
    depends, made, nodes = sources(graph), set(), []
    custom: set[ir.Value] = set()
    for node in graph:
        if node.domain or custom.intersection(node.inputs):
            custom.update(node.outputs)
        elif not depends[node.outputs[0]]:
            nodes.append(node)
            if node.op_type in PRODUCTS or made.intersection(node.inputs):
                made.update(node.outputs)
    return nodes, made


def _computed(model: ir.Model, wanted: Sequence[ir.Value]) -> list[np.ndarray]:
    """Values of the constant tensors `wanted`."""
    if not wanted:
        return []
    names = [value.name for value in wanted]
    part = ir.to_proto(ir.Model(ir.convenience.extract(model.graph, [], names), ir_version=model.ir_version))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(names, {})


def _num_products(model: ir.Model) -> int:
    return sum(node.op_type in PRODUCTS for node in model.graph)
