"""A PyTorch model to the deployed ONNX graph: traced, its custom operators single nodes, its nodes named after their modules."""

import ast
import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnxscript
import torch
from onnx import AttributeProto, NodeProto, defs
from torch import Tensor

from export import functions
from export.graph import Graph, integers, unused
from qdbev import schema
from qdbev.detector import Deployed, Detector
from qdbev.quant.export import exporting
from qdbev.quant.prepare import fold_batch_norm
from qdbev.schema import Interface

_COMPUTE = ("Conv", "Gemm", "MatMul", *functions.INPUTS)
"""Nodes that carry exactly the name of their module, so that an engine's layers can be traced back to it."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata in which torch 2.11 and 2.13 leave the modules around a node, outermost first, the traced call last."""
_DEPLOYED, _QUANT_OP = "model.", ".op"
"""What `Deployed` puts in front of a module's path, and `QuantOp` behind it."""
_LEGACY_CHECK = r".*isinstance\(treespec, LeafSpec\).*"


def trace(model: Detector, image_hw: tuple[int, int]) -> onnx.ModelProto:
    """The deployed graph of a float or quantized model, batch 1, for padded images of `image_hw`.

    Quantized weights are still float followed by Q/DQ (qdq.py packs them). The model is not changed.
    """
    model = fold_batch_norm(copy.deepcopy(model).eval())
    interface = model.interface(image_hw)
    with exporting(model), _quiet():
        program = torch.onnx.export(
            Deployed(model).eval(),
            _example_inputs(interface),
            dynamo=True,
            opset_version=schema.OPSET,
            input_names=list(interface.inputs),
            output_names=list(interface.outputs),
            custom_translation_table=_translations(),
            verbose=False,
        )
        proto = program.model_proto  # reads the weights, which are baked only in here
    graph = Graph(proto)
    _skip_stacks(graph)
    graph.prune()
    _name_nodes(graph)
    _forget_sources(proto)
    functions.attach(proto)
    return proto


def _example_inputs(interface: Interface) -> tuple[Tensor, ...]:
    """Tensors of the interface's shapes, in its order: the exporter reads shapes and types only."""
    return tuple(torch.zeros(shape) for shape in interface.inputs.values())


def _translations() -> dict[Any, Any]:
    """One bare node for each operator of ours; bodies are attached afterwards, since the exporter would inline them."""
    domain = onnxscript.values.Opset(schema.OP_DOMAIN, schema.OP_VERSION)
    msda, sca, im2col = (onnxscript.values.Op(domain, name, _op_schema(name)) for name in (functions.MSDA, functions.SCA, functions.IM2COL))

    def translate_msda(value: Any, reference_points: Any, sampling_offsets: Any, attention_logits: Any, level_hw: Any) -> Any:
        return msda(value, reference_points, sampling_offsets, attention_logits, level_hw=list(level_hw), **functions.PLUGIN)

    def translate_sca(value: Any, reference_points: Any, visible: Any, sampling_offsets: Any, attention_logits: Any, level_hw: Any) -> Any:
        return sca(value, reference_points, visible, sampling_offsets, attention_logits, level_hw=list(level_hw), **functions.PLUGIN)

    def translate_im2col(x: Any, offsets: Any, mask: Any, stride: int) -> Any:
        return im2col(x, offsets, mask, stride=stride, **functions.PLUGIN)

    return {
        torch.ops.qdbev.multi_scale_deformable_attention.default: translate_msda,
        torch.ops.qdbev.spatial_cross_attention.default: translate_sca,
        torch.ops.qdbev.modulated_deformable_im2col.default: translate_im2col,
    }


def _op_schema(op_type: str) -> defs.OpSchema:
    kinds = dict.fromkeys(functions.PLUGIN, AttributeProto.STRING) | functions.ATTRIBUTES[op_type]
    return defs.OpSchema(
        op_type,
        schema.OP_DOMAIN,
        schema.OP_VERSION,
        inputs=[defs.OpSchema.FormalParameter(name, "T") for name in functions.INPUTS[op_type]],
        outputs=[defs.OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[defs.OpSchema.Attribute(name, defs.OpSchema.AttrType(kind), required=True) for name, kind in kinds.items()],
    )


def _skip_stacks(graph: Graph) -> None:
    """Read an entry of a stack directly, so that the other entries (the earlier decoder layers' outputs) can be pruned."""
    for node in graph.proto.node:
        entry = _stacked_entry(graph, node)
        if entry is not None:
            graph.redirect(node.output[0], entry)


def _stacked_entry(graph: Graph, node: NodeProto) -> str | None:
    """The tensor that a Gather picks out of a Concat of Unsqueezes along the same axis, None if it is no such node."""
    if node.op_type != "Gather" or node.input[0] not in graph.producers:
        return None
    stack, index, axis = graph.producers[node.input[0]], graph.constant(node.input[1]), integers(node, "axis", 0)
    if stack.op_type != "Concat" or index is None or index.ndim or integers(stack, "axis", 0) != axis:
        return None
    parts = [graph.producers.get(name) for name in stack.input]
    for part in parts:
        axes = graph.constant(part.input[1]) if part is not None and part.op_type == "Unsqueeze" else None
        if axes is None or axes.tolist() != [axis]:
            return None
    return parts[int(index)].input[0]


def _name_nodes(graph: Graph) -> None:
    """Compute nodes take the name of their module, others that name in front of their own; constants lose the wrapper's name."""
    taken: set[str] = set()
    for node in graph.proto.node:
        path = _module_path(node)
        wanted = path if node.op_type in _COMPUTE and path else f"{path}/{node.name}" if path else node.name
        node.name = unused(wanted, taken)
        taken.add(node.name)
    graph.rename({name: name.removeprefix(_DEPLOYED) for name in graph.initializers})


def _module_path(node: NodeProto) -> str:
    """Name of the module in which a node was traced, as `named_modules` says it; empty for the outermost."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            *scopes, _ = ast.literal_eval(entry.value)
            path = f"{scopes[-1]}." if scopes else ""
            return path.removeprefix(_DEPLOYED).removesuffix(".").removesuffix(_QUANT_OP)
    return ""


def _forget_sources(proto: onnx.ModelProto) -> None:
    """Drop stack traces and other notes of the exporter, which hold paths of this machine."""
    for item in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.graph.value_info, *proto.graph.input):
        del item.metadata_props[:]
        item.doc_string = ""
    proto.graph.name = "qdbev"


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns that torchvision is absent and about its own use of torch's internals; neither concerns a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_LEGACY_CHECK, category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
