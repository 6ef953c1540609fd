"""Traces a PyTorch model to the deployed ONNX graph, with custom operators as single nodes and nodes named after their modules."""

import ast
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnx import AttributeProto, defs
from onnx_ir.passes import common

from export.bodies.attach import attach
from export.graph import PRODUCTS, constant, remove_unused
from qdbev.detector import Deployed, Detector
from qdbev.ops import contract
from qdbev.quant.export import exporting
from qdbev.quant.prepare import fold_batch_norm

_NAMED = (*PRODUCTS, *contract.OPERATORS)
"""Operators whose nodes have exactly the name of their module, so that an engine's layers can be traced back to it."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata in which torch 2.11 and 2.13 note the modules around a node, outermost first, the traced call last."""
_DEPLOYED, _QUANT_OP = "model.", ".op"
"""Prefix that `Deployed` adds to a module's path, and suffix that `QuantOp` adds."""
_ATTRIBUTE_TYPES = {"int": (AttributeProto.INT, int), "ints": (AttributeProto.INTS, list)}
"""ONNX and Python types of the attribute types of the contract."""


def trace(model: Detector, image_hw: tuple[int, int]) -> ir.Model:
    """The deployed graph of a float or quantized model, batch 1, for padded images of `image_hw`.

    Quantized weights are still float followed by Q/DQ (qdq.py packs them). The model is not changed.
    """
    model = fold_batch_norm(copy.deepcopy(model).eval())
    interface = model.interface(image_hw)
    with exporting(model), _quiet():
        program = torch.onnx.export(
            Deployed(model).eval(),
            tuple(torch.zeros(shape) for shape in interface.inputs.values()),  # the exporter reads shapes and types only
            dynamo=True,
            opset_version=contract.OPSET,
            input_names=list(interface.inputs),
            output_names=list(interface.outputs),
            custom_translation_table=_translations(),
            verbose=False,
        )
        traced = ir.from_proto(program.model_proto)  # inside `exporting`: only here are the weights read and fixed
    _skip_stacks(traced.graph)
    remove_unused(traced)
    _name_nodes(traced.graph)
    _remove_metadata(traced)
    attach(traced)
    return traced


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """A translation to a bare node for each PyTorch operator of the contract. Bodies are attached later: the exporter would inline them."""
    registered = getattr(torch.ops, contract.DOMAIN)  # by importing the operator's module, which every model that uses it has done
    return {
        getattr(registered, operator.torch_name).default: _translation(operator)
        for operator in contract.OPERATORS.values()
        if not operator.has_integer_value and hasattr(registered, operator.torch_name)
    }


def _translation(operator: contract.Operator) -> Callable[..., Any]:
    """A function that creates the ONNX node of an operator. It takes the operator's inputs and attributes by position or name."""
    domain = onnxscript.values.Opset(contract.DOMAIN, contract.VERSION)
    node = onnxscript.values.Op(domain, operator.name, _op_schema(operator))

    def translate(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip((*operator.inputs, *operator.attributes), args, strict=False)) | kwargs
        attributes = {name: _ATTRIBUTE_TYPES[kind][1](given[name]) for name, kind in operator.attributes.items()}
        return node(*(given[name] for name in operator.inputs), **attributes, **contract.PLUGIN_ATTRIBUTES)

    return translate


def _op_schema(operator: contract.Operator) -> defs.OpSchema:
    """ONNX schema of an operator and of the attributes that name its plugin."""
    kinds = dict.fromkeys(contract.PLUGIN_ATTRIBUTES, AttributeProto.STRING)
    kinds |= {name: _ATTRIBUTE_TYPES[kind][0] for name, kind in operator.attributes.items()}
    return defs.OpSchema(
        operator.name,
        contract.DOMAIN,
        contract.VERSION,
        inputs=[defs.OpSchema.FormalParameter(name, "T") for name in operator.inputs],
        outputs=[defs.OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[defs.OpSchema.Attribute(name, defs.OpSchema.AttrType(kind), required=True) for name, kind in kinds.items()],
    )


def _skip_stacks(graph: ir.Graph) -> None:
    """Read an entry of a stack directly, so that the other entries (the earlier decoder layers' outputs) can be removed."""
    for node in graph:
        entry = _stacked_entry(node)
        if entry is not None:
            ir.convenience.replace_nodes_and_values(graph, node, [], [], node.outputs, [entry])


def _stacked_entry(node: ir.Node) -> ir.Value | None:
    """The value that a Gather picks out of a Concat of Unsqueezes along the same axis, None for any other node."""
    stack = node.inputs[0].producer() if node.op_type == "Gather" else None
    if stack is None or stack.op_type != "Concat":
        return None
    index, axis = constant(node.inputs[1]), node.attributes.get_int("axis", 0)
    if index is None or index.ndim or stack.attributes.get_int("axis") != axis:
        return None
    parts = [value.producer() for value in stack.inputs]
    for part in parts:
        axes = constant(part.inputs[1]) if part is not None and part.op_type == "Unsqueeze" else None
        if axes is None or axes.tolist() != [axis]:
            return None
    return parts[int(index)].inputs[0]


def _name_nodes(graph: ir.Graph) -> None:
    """Give compute nodes the name of their module, other nodes that name as a prefix, and remove the wrapper's prefix from constants."""
    taken: set[str] = set()
    for node in graph:
        path = _module_path(node)
        wanted = path if node.op_type in _NAMED and path else f"{path}/{node.name}" if path else node.name
        node.name, count = wanted, 1
        while node.name in taken:
            node.name, count = f"{wanted}_{count}", count + 1
        taken.add(node.name)
    constants = list(graph.initializers.values())
    ir.convenience.rename_values(constants, [value.name.removeprefix(_DEPLOYED) for value in constants])


def _module_path(node: ir.Node) -> str:
    """Name of the module in which a node was traced, as in `BEVFormer.named_modules`; empty for the outermost."""
    if _SCOPES not in node.metadata_props:
        return ""
    *scopes, _ = ast.literal_eval(node.metadata_props[_SCOPES])
    path = f"{scopes[-1]}." if scopes else ""
    return path.removeprefix(_DEPLOYED).removesuffix(".").removesuffix(_QUANT_OP)


def _remove_metadata(model: ir.Model) -> None:
    """Remove stack traces and other notes of the exporter, which contain paths of this machine."""
    common.ClearMetadataAndDocStringPass()(model)
    for item in (model, model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        item.metadata_props.clear()
    model.graph.name = "qdbev"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of the exporter that do not concern a user: torchvision is missing, and it uses torch's internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
