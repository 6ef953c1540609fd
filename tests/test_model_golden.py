"""Compares the network, layer by layer, with numbers of the official BEVFormer (see golden/README.md).

The weights are loaded by their official key names. The tolerances and their reasons are in golden_model.py.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from golden_model import ATOL, BOX_ATOL, close, inputs, micro_config, official_micro, two_frames
from torch import Tensor

from qdbev.detector import Output
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.geometry import pillar_points, project
from qdbev.nn.box_code import decode


class Recorder:
    """Records the inputs and outputs of named submodules, in the order of the calls."""

    def __init__(self, model: BEVFormer, names: list[str]) -> None:
        self.outputs: dict[str, list] = {name: [] for name in names}
        self.inputs: dict[str, list] = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable:
        def record(module: BEVFormer, args: tuple, output: Tensor) -> None:
            self.outputs[name].append(output)
            self.inputs[name].append(args)

        return record


@pytest.fixture(scope="module")
def recorded() -> tuple[tuple[Output, Output], Recorder]:
    """Run two frames; returns their outputs and a recorder of the layers in between."""
    model = official_micro(shifted_reference=False)
    layers = [f"encoder.layers.{layer}" for layer in (0, 1)]
    names = [f"backbone.layer{stage}" for stage in (1, 2, 3, 4)] + [
        f"{layer}{part}" for layer in layers for part in ("", ".temporal", ".spatial")
    ]
    recorder = Recorder(model, [*names, "decoder", "decoder.layers.0", "decoder.layers.1"])
    with torch.no_grad():
        return two_frames(model), recorder


@pytest.mark.parametrize("frame", [0, 1])
def test_backbone_stages_and_neck_equal_the_official_ones(recorded, golden_micro, frame):
    outputs, recorder = recorded
    for stage in (1, 2, 3, 4):
        output = recorder.outputs[f"backbone.layer{stage}"][frame]
        golden = golden_micro[f"f{frame}_stage{stage}"]
        close(output[:, :: output.shape[1] // 16, ::4, ::4], golden)
    close(outputs[frame].image_features[0][0], golden_micro[f"f{frame}_fpn0"])


@pytest.mark.parametrize("frame", [0, 1])
def test_every_encoder_layer_equals_the_official_one(recorded, golden_micro, frame):
    outputs, recorder = recorded
    rows = golden_micro["rows_enc"]
    for layer in (0, 1):
        name = f"encoder.layers.{layer}"
        close(recorder.outputs[f"{name}.temporal"][frame][0, rows], golden_micro[f"f{frame}_enc{layer}_tsa"])
        close(recorder.outputs[f"{name}.spatial"][frame][0, rows], golden_micro[f"f{frame}_enc{layer}_sca"])
        close(recorder.outputs[name][frame][0, rows], golden_micro[f"f{frame}_enc{layer}_out"])
    close(outputs[frame].bev[0, golden_micro["rows_bev"]], golden_micro[f"f{frame}_bev_embed"])


@pytest.mark.parametrize("frame", [0, 1])
def test_bev_query_position_and_ego_motion_equal_the_official_ones(recorded, golden_micro, frame):
    _, recorder = recorded
    rows = golden_micro["rows_enc"]
    query, query_pos, queue, reference_points, _ = recorder.inputs["encoder.layers.0"][frame]
    close(query[0, rows], golden_micro[f"f{frame}_bev_query_in"])
    close(query_pos[0, rows], golden_micro["bev_pos"])
    still = recorder.inputs["encoder.layers.0"][0][3][0, 1]
    close(reference_points[0, 0] - still, np.broadcast_to(golden_micro[f"f{frame}_shift"], still.shape), atol=1e-6)
    if frame == 1:
        close(queue[0, 0, golden_micro["rows_bev"]], golden_micro["f1_prev_bev_rotated"])
    can_bus = inputs(frame, None if frame == 0 else 0)[2][0]
    close(can_bus, golden_micro[f"f{frame}_can_bus_used"], atol=1e-4)


def test_projection_and_visibility_equal_the_official_ones(recorded, golden_micro):
    _, recorder = recorded
    views = recorder.inputs["encoder.layers.0"][0][4]
    golden = golden_micro["ref_cam"]
    near = np.abs(golden) < 5
    ours = views.reference_points[0].numpy()
    np.testing.assert_allclose(ours[near], golden[near], atol=ATOL, rtol=0)
    np.testing.assert_array_equal(views.visible[0].numpy() > 0, golden_micro["bev_mask"].any(-1))
    config = micro_config(shifted_reference=False)
    pillars = pillar_points(config.bev_hw, config.num_pillar_points, config.pc_range)
    np.testing.assert_array_equal(project(pillars, inputs(0, None)[1], (192, 320))[1][0], golden_micro["bev_mask"])


@pytest.mark.parametrize("frame", [0, 1])
def test_decoder_states_references_and_head_equal_the_official_ones(recorded, golden_micro, frame):
    outputs, recorder = recorded
    decoded = recorder.outputs["decoder"][frame]
    close(torch.stack([layer.state[0] for layer in decoded]), golden_micro[f"f{frame}_dec_states"])
    refined = [(layer.reference + layer.regression[..., (0, 1, 4)]).sigmoid()[0] for layer in decoded]
    close(torch.stack(refined), golden_micro[f"f{frame}_inter_references"])
    if frame == 0:
        close(decoded[0].reference[0].sigmoid(), golden_micro["init_reference"])
    close(outputs[frame].cls_logits[:, 0], golden_micro[f"f{frame}_all_cls_scores"])
    close(outputs[frame].box_code[:, 0], golden_micro[f"f{frame}_all_bbox_preds"], BOX_ATOL)


@pytest.mark.parametrize("frame", [0, 1])
def test_decoded_boxes_equal_the_official_ones(recorded, golden_micro, frame):
    output = recorded[0][frame]
    config = micro_config(shifted_reference=False)
    detections = decode(output.cls_logits[-1], output.box_code[-1], config.max_boxes, config.post_center_range)[0]
    boxes = detections.boxes.copy()
    boxes[:, 2] -= boxes[:, 5] / 2  # the official boxes have their origin at the bottom
    np.testing.assert_allclose(detections.scores, golden_micro[f"f{frame}_scores_3d"], atol=ATOL)
    np.testing.assert_array_equal(detections.labels, golden_micro[f"f{frame}_labels_3d"])
    # Sizes are exponentials of the code, so that an error of the code is multiplied by the size.
    np.testing.assert_allclose(boxes, golden_micro[f"f{frame}_boxes_3d"], atol=BOX_ATOL * 4)


def test_shifted_reference_equals_the_official_code_of_june_2022(golden_micro):
    model = official_micro(shifted_reference=True)
    recorder = Recorder(model, ["encoder.layers.0.temporal"])
    with torch.no_grad():
        _, output = two_frames(model)
    close(recorder.outputs["encoder.layers.0.temporal"][1][0, golden_micro["rows_enc"]], golden_micro["alias_f1_enc0_tsa"])
    close(output.bev[0, golden_micro["rows_bev"]], golden_micro["alias_f1_bev_embed"])
    close(output.cls_logits[:, 0], golden_micro["alias_f1_all_cls_scores"])
    close(output.box_code[:, 0], golden_micro["alias_f1_all_bbox_preds"], BOX_ATOL)
