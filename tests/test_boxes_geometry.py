"""Box codes, decoding, projection and the BEV grid, compared with the official code's numbers."""

import dataclasses

import numpy as np
import pytest
import torch
from golden_inputs import make_coder_inputs, make_gt

from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.geometry import cell_centers, inverse, pillar_points, project, rigid, rotation_z
from qdbev.nn.box_code import decode, encode, from_code
from qdbev.recipes import RECIPES

TINY = RECIPES["tiny"]().model


def test_codes_and_boxes_equal_the_official_ones(golden_modules):
    boxes = torch.from_numpy(make_gt("tiny")[0])
    np.testing.assert_allclose(encode(boxes), golden_modules["normalize_bbox_tiny_gt"], atol=1e-5)
    np.testing.assert_allclose(from_code(encode(boxes)), golden_modules["denormalize_bbox_tiny_gt"], atol=1e-4)


@pytest.mark.parametrize("sample", [0, 1])
def test_decoding_equals_the_official_coder_and_drops_centres_out_of_range(golden_modules, sample):
    logits, code = (torch.from_numpy(array)[-1] for array in make_coder_inputs())
    detections = decode(logits, code, TINY.max_boxes, TINY.post_center_range)[sample]
    assert len(detections.scores) == 252
    np.testing.assert_allclose(detections.scores, golden_modules[f"coder{sample}_scores"], atol=1e-6)
    np.testing.assert_array_equal(detections.labels, golden_modules[f"coder{sample}_labels"])
    np.testing.assert_allclose(detections.boxes, golden_modules[f"coder{sample}_bboxes_gravity"], rtol=1e-4, atol=1e-4)


def test_decoding_asks_for_no_more_boxes_than_there_are():
    detections = decode(torch.randn(1, 3, 10), torch.zeros(1, 3, 10), 300, TINY.post_center_range)[0]
    assert detections.boxes.shape == (30, 9)
    assert (np.diff(detections.scores) <= 0).all()


def test_reference_points_equal_the_official_ones(golden_modules):
    np.testing.assert_allclose(cell_centers((4, 5)), golden_modules["ref2d_4x5"][0, :, 0], atol=1e-7)
    low, size = np.array([-51.2, -51.2, -5.0]), np.array([102.4, 102.4, 8.0])
    unit = (pillar_points((4, 5), 4, TINY.pc_range).numpy() - low) / size
    np.testing.assert_allclose(unit, golden_modules["ref3d_4x5"][0], atol=1e-6)


def test_a_point_ahead_is_seen_and_one_behind_or_beside_is_not():
    lidar2img = torch.tensor([[100.0, 50.0, 0, 0], [0, 50.0, -100.0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]]).view(1, 1, 4, 4)
    points = torch.tensor([[[0.0, 10.0, 0.0], [0.500005, -1.0, -0.500005], [9.0, 10.0, 0.0]]])
    uv, visible = project(points, lidar2img, (100, 100))
    assert visible[0, 0, :, 0].tolist() == [True, False, False]
    behind = uv[0, 0, 1, 0]
    assert ((behind > 0) & (behind < 1)).all()  # only its depth shows that the point is behind the camera
    torch.testing.assert_close(uv[0, 0, 0, 0], torch.tensor([0.5, 0.5]))
    assert uv.isfinite().all()


def test_a_rigid_transform_times_its_inverse_is_the_identity():
    matrix = rigid(rotation_z(0.7), np.array([1.0, -2.0, 3.0]))
    np.testing.assert_allclose(matrix @ inverse(matrix), np.eye(4), atol=1e-12)


def test_fresh_weights_start_as_the_official_ones_do(golden_modules):
    config = dataclasses.replace(TINY, embed_dim=64, ffn_dim=128, bev_hw=(5, 5), encoder_layers=1, decoder_layers=1)
    model = BEVFormer(config)
    layer = model.encoder.layers[0]
    np.testing.assert_allclose(layer.temporal.sampling_offsets.bias.detach(), golden_modules["init_bias_tsa"], atol=1e-6)
    np.testing.assert_allclose(
        layer.spatial.deformable_attention.sampling_offsets.bias.detach(), golden_modules["init_bias_sca"], atol=1e-6
    )
    np.testing.assert_allclose(
        model.decoder.layers[0].cross_attention.sampling_offsets.bias.detach(), golden_modules["init_bias_dec"], atol=1e-6
    )
    np.testing.assert_allclose(model.head.cls_branches[0][-1].bias.detach(), golden_modules["init_bias_cls"], atol=1e-6)
    assert not layer.temporal.sampling_offsets.weight.any()
