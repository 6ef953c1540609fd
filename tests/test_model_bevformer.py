"""BEVFormer's forward: batches, first and later frames together, and inputs that do not fit."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from golden_inputs import make_can_bus, make_images, make_lidar2img
from golden_model import micro_config
from torch import Tensor

from qdbev.can_bus import YAW_DEG, YAW_RAD, relative_can_bus
from qdbev.detector import Deployed
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.schema import Batch


@pytest.fixture(scope="module")
def model() -> BEVFormer:
    torch.manual_seed(0)
    return BEVFormer(micro_config(shifted_reference=False)).eval()


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Return two samples with images, cameras and motion of their own; the second is the first frame of its scene."""
    images = torch.stack([torch.from_numpy(make_images("micro", frame)) for frame in (0, 1)])[..., ::2, ::2]  # fewer pixels take less time
    lidar2img = torch.from_numpy(make_lidar2img("micro")).float()
    lidar2img[:, :2] /= 2
    moved = lidar2img.clone()
    moved[:, 0, 3] += 40
    can_bus = [relative_can_bus(make_can_bus(1, "micro"), make_can_bus(0, "micro")), relative_can_bus(make_can_bus(1, "micro"), None)]
    return Batch(
        images=images,
        lidar2img=torch.stack((lidar2img, moved)),
        can_bus=torch.stack([torch.from_numpy(c) for c in can_bus]),
        has_prev=torch.tensor([1.0, 0.0]),
        boxes=[torch.zeros(0, 9)] * 2,
        labels=[torch.zeros(0, dtype=torch.int64)] * 2,
        tokens=["later", "first"],
    )


@pytest.fixture(scope="module")
def prev_bev() -> Tensor:
    return torch.randn(2, 400, 64, generator=torch.Generator().manual_seed(1))


def sample(batch: Batch, index: int) -> Batch:
    return Batch(*(field[index : index + 1] for field in batch))


@torch.no_grad()
def test_each_sample_of_a_batch_gets_what_it_gets_alone(model, batch, prev_bev):
    together, bev = model(batch, prev_bev)
    assert torch.equal(together.bev, bev)
    for index in (0, 1):
        alone, _ = model(sample(batch, index), prev_bev[index : index + 1])
        for name in ("bev", "cls_logits", "box_code"):
            axis = 0 if name == "bev" else 1
            ours = getattr(together, name).narrow(axis, index, 1)
            torch.testing.assert_close(ours, getattr(alone, name), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_first_frame_ignores_the_state(model, batch, prev_bev):
    first, state = sample(batch, 1), prev_bev[1:]
    without = model(first)[0].bev
    torch.testing.assert_close(model(first, state * 100)[0].bev, without, atol=0, rtol=0)
    assert not torch.allclose(model(first._replace(has_prev=torch.ones(1)), state)[0].bev, without)


@torch.no_grad()
def test_advance_gives_the_state_of_the_forward(model, batch, prev_bev):
    one = sample(batch, 0)
    for state in (None, prev_bev[:1]):
        assert torch.equal(model.advance(one, state), model(one, state)[1])


@torch.no_grad()
def test_the_deployed_graph_gives_the_last_layer(model, batch, prev_bev):
    output, _ = model(batch, prev_bev)
    deployed = Deployed(model)(batch.images, batch.lidar2img, batch.can_bus, prev_bev, batch.has_prev)
    for ours, full in zip(deployed, (output.cls_logits[-1], output.box_code[-1], output.bev), strict=True):
        torch.testing.assert_close(ours, full, atol=0, rtol=0)


@torch.no_grad()
def test_the_deployed_graph_has_the_shapes_of_its_interface_and_refuses_other_inputs(model, batch, prev_bev):
    one = sample(batch, 0)
    interface = model.interface(tuple(one.images.shape[-2:]))
    inputs = {
        name: value.numpy()
        for name, value in zip(interface.inputs, (one.images, one.lidar2img, one.can_bus, prev_bev[:1], one.has_prev), strict=True)
    }
    outputs = Deployed(model).run(inputs)
    assert {name: value.shape for name, value in outputs.items()} == interface.outputs
    with pytest.raises(ValueError, match=r"can_bus is float32\(1, 17\), the network takes float32\(1, 18\)"):
        Deployed(model).run({**inputs, "can_bus": inputs["can_bus"][:, :17]})
    with pytest.raises(ValueError, match=r"has_prev is float64\(1,\)"):
        Deployed(model).run({**inputs, "has_prev": inputs["has_prev"].astype("float64")})
    inputs.pop("prev_bev")
    with pytest.raises(ValueError, match="inputs are images, lidar2img, can_bus, has_prev; the network takes images, .*, prev_bev"):
        Deployed(model).run(inputs)


@torch.no_grad()
def test_a_network_whose_outputs_are_not_those_of_its_interface_is_refused(model, monkeypatch):
    inputs = {name: np.zeros(shape, np.float32) for name, shape in model.interface((64, 96)).inputs.items()}
    Deployed(model).run({**inputs, "can_bus": inputs["can_bus"][:, ::-1]})  # any memory layout will do
    deployed = model.deployed
    for wrong in (lambda *tensors: deployed(*tensors)[:2], lambda *tensors: deployed(*tensors)[::-1]):
        monkeypatch.setattr(model, "deployed", wrong)
        with pytest.raises(ValueError, match=r"BEVFormer.deployed returns shapes .*; its interface has .* for cls_logits, box_code, bev"):
            Deployed(model).run(inputs)


def test_inputs_that_do_not_fit_are_refused_by_name(model, batch, prev_bev):
    cases = {
        "images has shape": (batch._replace(images=batch.images[:, :5]), None),
        "lidar2img has shape": (batch._replace(lidar2img=batch.lidar2img[:1]), None),
        "can_bus has shape": (batch._replace(can_bus=batch.can_bus[:, :17]), None),
        "prev_bev has shape": (batch, prev_bev[:, :399]),
    }
    for message, (inputs, state) in cases.items():
        with pytest.raises(ValueError, match=message):
            model(inputs, state)


@torch.no_grad()
def test_without_absolute_yaw_the_network_reads_only_the_turn(batch, prev_bev):
    torch.manual_seed(0)
    model = BEVFormer(dataclasses.replace(micro_config(shifted_reference=False), absolute_yaw=False)).eval()
    seen = []
    model.encoder.can_bus_mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    bev = model(batch, prev_bev)[0].bev
    turn = float(batch.can_bus[0, YAW_DEG])
    assert turn != 0
    torch.testing.assert_close(seen[0][:, YAW_RAD], torch.tensor([math.radians(turn), 0.0]))
    torch.testing.assert_close(seen[0][:, YAW_DEG], torch.tensor([turn, 0.0]))
    jumped = batch.can_bus.clone()
    jumped[0, YAW_DEG] += 360
    torch.testing.assert_close(model(batch._replace(can_bus=jumped), prev_bev)[0].bev, bev, atol=1e-3, rtol=0)
