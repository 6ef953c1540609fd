"""Digests record the structure of deployed graphs, so that a refactoring of a pass can be shown to change nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from graph_digest import describe, digest
from onnx import TensorProto, helper, numpy_helper
from small_networks import IMAGE_HW, calibrate_on_noise, exported_network

from bench.untrained import untrained
from export import deform_conv, qdq, to_onnx
from export.trace import trace
from qdbev.nn.config import BackboneConfig
from qdbev.ops import contract
from qdbev.recipes import at_bits
from qdbev.restore import quantized

GOLDEN = Path(__file__).with_name("golden_graphs.json")
"""Digest of each form, with a dated list of the reasons why digests changed."""
INTERFACE = exported_network().model.interface(IMAGE_HW)
FORMS = {
    "float": ("float", {}),
    "float-float16": ("float", {"float16": True}),
    "float-standard-deform-conv": ("float", {"standard_deform_conv": True}),
    "w8a8": ("w8a8", {}),
    "w8a8-float16": ("w8a8", {"float16": True}),
    "w4a6": ("w4a6", {}),
    "w4a6-int4": ("w4a6", {"int4": True}),
}
"""Bit widths of the network and options of the export, by the name of the form."""


def traced(kind: str) -> ir.Model:
    """A small network with deformable convolutions and random weights, traced and packed."""
    backbone = BackboneConfig(depths=(1, 1, 1), width=8, out_stages=(1, 2), style="caffe", deformable_stages=(1, 2))
    config = exported_network(backbone=backbone, decoder_layers=2)
    model = untrained(config).eval()
    if kind != "float":
        model = quantized(at_bits(config, kind), model).eval()
        calibrate_on_noise(model)
    return trace(model, IMAGE_HW)


@pytest.fixture(scope="module")
def packed() -> Callable[[str], ir.Model]:
    """A fresh copy of the packed graph at the given widths; each is traced once."""
    graphs: dict[str, ir.Model] = {}

    def get(kind: str) -> ir.Model:
        if kind not in graphs:
            graphs[kind] = traced(kind)
            assert (qdq.pack_weights(graphs[kind]) > 0) == (kind != "float")
            assert (qdq.clip_early(graphs[kind]) > 0) == (kind == "w4a6")
        return graphs[kind].clone()

    return get


def deployed(graph: ir.Model, int4: bool = False, standard_deform_conv: bool = False, **options: bool) -> tuple[ir.Model, dict[str, int]]:
    """The graph in one of the forms, and the number of changes of each pass."""
    if int4:
        return qdq.pack_int4(graph), {}
    if standard_deform_conv:
        assert deform_conv.use_standard_node(graph) == 2
    return graph, to_onnx.optimize(graph, INTERFACE, **options)


@pytest.mark.parametrize("form", FORMS)
def test_the_deployed_graph_has_the_recorded_structure(form: str, packed: Callable[[str], ir.Model], tmp_path: Path) -> None:
    kind, options = FORMS[form]
    model = ir.to_proto(deployed(packed(kind), **options)[0])
    found, golden = digest(model), json.loads(GOLDEN.read_text())["forms"][form]
    (tmp_path / "description.txt").write_text("\n".join(describe(model)))
    assert found["op_types"] == golden["op_types"]
    assert found["sha256"] == golden["sha256"], f"compare {tmp_path / 'description.txt'} with that of the commit before"


@pytest.mark.parametrize("form", [form for form, (_, options) in FORMS.items() if "int4" not in options])
def test_every_pass_finds_what_it_is_for(form: str, packed: Callable[[str], ir.Model]) -> None:
    kind, options = FORMS[form]
    graph, done = deployed(packed(kind), **options)
    assert "Einsum" not in {node.op_type for node in graph.graph}
    assert (done["constant_products"], done["projections"]) == (9, 1)  # seven linears and two products of the first decoder layer
    assert done["int8_values"] == (0 if kind == "float" else 4)
    assert ("float16_nodes" in done) == ("float16" in options)


def test_the_projection_is_expanded_whatever_letters_geometry_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    einsum, renamed = torch.einsum, []

    def with_other_letters(equation: str, *operands: torch.Tensor) -> torch.Tensor:
        renamed.append(equation.translate(str.maketrans("bnijdk", "uvwxyz")))
        return einsum(renamed[-1], *operands)

    monkeypatch.setattr(torch, "einsum", with_other_letters)
    graph = trace(untrained(exported_network()).eval(), IMAGE_HW)
    found = {node.attributes["equation"].as_string() for node in graph.graph if node.op_type == "Einsum"}
    assert found == set(renamed)
    assert to_onnx.optimize(graph, INTERFACE)["projections"] == 1
    assert "Einsum" not in {node.op_type for node in graph.graph}


def drawing(axis: int = 1, prefix: str = "", shared: bool = False) -> onnx.ModelProto:
    """A graph of two joined branches of x; a `prefix` changes names only."""
    names = {name: f"{prefix}{name}" for name in ("a", "b", "w", "v")}
    nodes = [
        helper.make_node("MatMul", ["x", names["w"]], [names["a"]], name="first"),
        helper.make_node("MatMul", ["x", names["w"] if shared else names["v"]], [names["b"]], name="second"),
    ]
    join = helper.make_node("Concat", [names["a"], names["b"]], ["y"], name=f"{prefix}join", axis=axis)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in ("x", "y")]
    weights = [numpy_helper.from_array(torch.ones(2, 2).numpy(), names[name]) for name in ("w", "v")]
    nodes = nodes[::-1] if prefix else nodes
    graph = helper.make_graph([*nodes, join], "drawing", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", contract.OPSET)])


def test_a_digest_sees_structure_and_neither_tensor_names_nor_file_order() -> None:
    assert digest(drawing()) == digest(drawing(prefix="other."))
    assert digest(drawing(axis=0)) != digest(drawing())
    assert digest(drawing(shared=True)) == digest(drawing())  # equal constants may or may not be merged
    renamed = drawing()
    renamed.graph.node[0].name = "renamed"
    assert digest(renamed) != digest(drawing())
