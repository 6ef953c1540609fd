"""The default policy quantizes the right layers of each group of BEVFormer, including deformable convolutions."""

import dataclasses
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.detectors.bevformer.recipes import POLICY, micro
from qdbev.nn.config import BackboneConfig
from qdbev.quant.prepare import LeafReport, describe, fold_batch_norm, prepare, table
from qdbev.recipes import at_bits

DEFORMABLE = BackboneConfig(depths=(1, 1, 1), width=16, style="caffe", deformable_stages=(1, 2), out_stages=(1, 2))
OFFSETS = "backbone.*.conv2.offset"


def prepared(backbone: BackboneConfig | None = None, **changes: object) -> tuple[BEVFormer, dict[str, LeafReport]]:
    config = at_bits(micro(), "w4a6")
    network = dataclasses.replace(config.model, backbone=backbone or config.model.backbone)
    with torch.device("meta"):
        model = BEVFormer(network)
    prepare(model, dataclasses.replace(config.quant, **{"embedding_bits": 4, **changes}))
    return model, {row.name: row for row in describe(model)}


def bits(row: LeafReport) -> tuple[int | None, int | None]:
    return row.weight_bits, row.activation_bits


def test_every_convolution_linear_layer_product_and_value_tensor_has_the_bits_of_the_policy():
    _, rows = prepared()
    edge = {name for name in rows if any(fnmatchcase(name, pattern) for pattern in ("*.conv1", "head.cls_*.6", "head.reg_*.4"))}
    edge = {name for name in edge if "layer" not in name}
    floats = {"encoder.can_bus_mlp.0", "encoder.can_bus_mlp.2", "decoder.reference_points"}
    assert len(edge) == 1 + 3 + 3
    for name, row in rows.items():
        expected = {"Embedding": (4, None), "Matmul": (None, 6)}.get(row.kind, (None, 6) if "Attention" in row.kind else (4, 6))
        assert bits(row) == ((8, 8) if name in edge else (None, None) if name in floats else expected), name
    kinds = {group: {row.kind for name, row in rows.items() if name.startswith(f"{group}.")} for group in micro().model.groups}
    assert kinds == {
        "backbone": {"Conv2d"},
        "neck": {"Conv2d"},
        "encoder": {"Linear", "Embedding", "MultiScaleDeformableAttention", "SpatialCrossAttention"},
        "decoder": {"Linear", "Embedding", "Matmul", "MultiScaleDeformableAttention"},
        "head": {"Linear"},
    }
    lines = [line.split() for line in table(list(rows.values())).splitlines()]
    assert ["encoder.bev_embedding", "Embedding", "4", "-", "not", "calibrated"] in lines
    assert ["decoder.reference_points", "Linear", "-", "-", "float"] in lines
    assert len(lines) == 1 + len(rows)


def test_nothing_that_multiplies_weights_escapes_the_policy():
    model, rows = prepared()
    weighted = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert weighted <= rows.keys()


def test_layers_that_predict_offsets_of_a_deformable_convolution_can_be_kept_at_edge_bits():
    edge_layers = (*POLICY.edge_layers, OFFSETS)
    _, rows = prepared(DEFORMABLE, edge_layers=edge_layers)
    assert {bits(rows[f"backbone.layer{stage}.0.conv2.offset"]) for stage in (2, 3)} == {(8, 8)}
    assert {bits(rows[f"backbone.layer{stage}.0.conv2.product"]) for stage in (2, 3)} == {(4, 6)}
    _, rows = prepared(DEFORMABLE)
    assert bits(rows["backbone.layer2.0.conv2.offset"]) == (4, 6)
    with pytest.raises(ValueError, match="match no layer"):
        prepared(edge_layers=edge_layers)


def test_the_product_of_a_deformable_convolution_takes_its_batch_norm():
    model = BEVFormer(dataclasses.replace(micro().model, backbone=DEFORMABLE)).eval()
    fold_batch_norm(model)
    assert model.backbone.layer2[0].conv2.product.bias is not None
