"""The one forward: batches, first and later frames together, and inputs that do not fit."""

import dataclasses
import math

import pytest
import torch
from golden_inputs import make_can_bus, make_images, make_lidar2img
from golden_model import micro_config

from qdbev import temporal
from qdbev.detector import Deployed
from qdbev.detectors.bevformer.model import BEVFormer


@pytest.fixture(scope="module")
def model() -> BEVFormer:
    torch.manual_seed(0)
    return BEVFormer(micro_config(shifted_reference=False)).eval()


@pytest.fixture(scope="module")
def batch(model: BEVFormer) -> tuple[torch.Tensor, ...]:
    """Two samples with images, cameras and motion of their own; the second is the first frame of its scene."""
    images = torch.stack([torch.from_numpy(make_images("micro", frame)) for frame in (0, 1)])
    lidar2img = torch.from_numpy(make_lidar2img("micro")).float()
    moved = lidar2img.clone()
    moved[:, 0, 3] += 40
    can_bus = [temporal.delta(make_can_bus(1, "micro"), make_can_bus(0, "micro")), temporal.delta(make_can_bus(1, "micro"), None)]
    prev_bev = torch.randn(2, 400, 64, generator=torch.Generator().manual_seed(1))
    return images, torch.stack((lidar2img, moved)), torch.stack([torch.from_numpy(c) for c in can_bus]), prev_bev, torch.tensor([1.0, 0.0])


@torch.no_grad()
def test_each_sample_of_a_batch_gets_what_it_gets_alone(model, batch):
    together = model(*batch)
    for sample in (0, 1):
        alone = model(*(tensor[sample : sample + 1] for tensor in batch))
        for name in ("bev", "cls_logits", "box_code"):
            axis = 0 if name == "bev" else 1
            ours = getattr(together, name).narrow(axis, sample, 1)
            torch.testing.assert_close(ours, getattr(alone, name), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_first_frame_does_not_see_what_lies_in_prev_bev(model, batch):
    images, lidar2img, can_bus, prev_bev, _ = (tensor[1:] for tensor in batch)
    without = model(images, lidar2img, can_bus)
    torch.testing.assert_close(model(images, lidar2img, can_bus, prev_bev * 100, torch.zeros(1)).bev, without.bev, atol=0, rtol=0)
    assert not torch.allclose(model(images, lidar2img, can_bus, prev_bev).bev, without.bev)


@torch.no_grad()
def test_the_deployed_graph_gives_the_last_layer(model, batch):
    output = model(*batch)
    cls_logits, box_code, bev = Deployed(model)(*batch)
    for ours, full in ((cls_logits, output.cls_logits[-1]), (box_code, output.box_code[-1]), (bev, output.bev)):
        torch.testing.assert_close(ours, full, atol=0, rtol=0)


def test_inputs_that_do_not_fit_are_refused_by_name(model, batch):
    images, lidar2img, can_bus, prev_bev, _ = batch
    cases = {
        "images has shape": (images[:, :5], lidar2img, can_bus),
        "lidar2img has shape": (images, lidar2img[:1], can_bus),
        "can_bus has shape": (images, lidar2img, can_bus[:, :17]),
        "prev_bev has shape": (images, lidar2img, can_bus, prev_bev[:, :399]),
    }
    for message, inputs in cases.items():
        with pytest.raises(ValueError, match=message):
            model(*inputs)


@torch.no_grad()
def test_without_absolute_yaw_the_network_reads_only_the_turn(batch):
    torch.manual_seed(0)
    model = BEVFormer(dataclasses.replace(micro_config(shifted_reference=False), absolute_yaw=False)).eval()
    images, lidar2img, can_bus, prev_bev, has_prev = batch
    seen = []
    model.encoder.can_bus_mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    bev = model(*batch).bev
    turn = float(can_bus[0, temporal.YAW_DEG])
    assert turn != 0
    torch.testing.assert_close(seen[0][:, temporal.YAW_RAD], torch.tensor([math.radians(turn), 0.0]))
    torch.testing.assert_close(seen[0][:, temporal.YAW_DEG], torch.tensor([turn, 0.0]))
    jumped = can_bus.clone()
    jumped[0, temporal.YAW_DEG] += 360
    torch.testing.assert_close(model(images, lidar2img, jumped, prev_bev, has_prev).bev, bev, atol=1e-3, rtol=0)
