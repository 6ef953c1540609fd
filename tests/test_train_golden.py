"""Compares losses, matching, gradients, a training step and the learning rate with the official code (see golden/README.md)."""

import numpy as np
import pytest
import torch
from golden_inputs import make_can_bus, make_coder_inputs, make_gt
from golden_model import close, inputs, official_micro, training_forward, two_frames
from torch import Tensor

from qdbev.config import TrainConfig
from qdbev.data.collate import queue_batch
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.detectors.bevformer.official import KEYS
from qdbev.nn.box_code import encode
from qdbev.schema import Frame
from train.criterion import Losses, detection_loss
from train.matcher import box_cost, cls_cost, match
from train.optimizer import learning_rate


def ground_truth() -> tuple[list[Tensor], list[Tensor]]:
    """Return the boxes and labels of the golden run, as a batch of one."""
    boxes, labels = make_gt("micro")
    return [torch.from_numpy(boxes)], [torch.from_numpy(labels)]


def named(losses: Losses) -> dict[str, float]:
    """Return the losses of each decoder layer under their official names; those of the last layer have no prefix."""
    names = {}
    for layer in range(len(losses.cls)):
        prefix = "" if layer == len(losses.cls) - 1 else f"d{layer}."
        names[f"{prefix}loss_cls"], names[f"{prefix}loss_bbox"] = losses.cls[layer].item(), losses.box[layer].item()
    return names


def golden_losses(golden: dict[str, np.ndarray], prefix: str) -> dict[str, float]:
    """Return the official losses by name; `prefix` chooses the run."""
    names = golden["train_loss_names" if "train" in prefix else "loss_names"]
    return {str(name): float(value) for name, value in zip(names, golden[f"{prefix}loss_values"], strict=True)}


@pytest.mark.parametrize(("shifted", "prefix"), [(False, ""), (True, "alias_")])
def test_losses_equal_the_official_ones(golden_micro, shifted, prefix):
    _, output = two_frames(official_micro(shifted))
    assert named(detection_loss(output, *ground_truth(), TrainConfig())) == pytest.approx(golden_losses(golden_micro, prefix), rel=1e-5)


def test_matching_and_every_gradient_equal_the_official_ones(golden_micro):
    model = official_micro(shifted_reference=False)
    model.backbone.requires_grad_(True)
    _, output = two_frames(model)
    boxes, labels = ground_truth()
    config = TrainConfig()
    for layer in (0, 1):
        logits, code = output.cls_logits[layer, 0], output.box_code[layer, 0]
        query, object_ = match(logits, code, encode(boxes[0]), labels[0], config.cls_weight, config.box_weight)
        np.testing.assert_array_equal(query[object_.argsort()].numpy(), golden_micro["match_query_of_gt"][layer])
    detection_loss(output, boxes, labels, config).total.backward()
    for key, norm in zip(golden_micro["grad_names"], golden_micro["grad_norms"], strict=True):
        gradient = official_gradient(model, str(key))
        assert gradient.norm().item() == pytest.approx(float(norm), rel=2e-3, abs=1e-5), key
        if f"grad::{key}" in golden_micro:
            golden = golden_micro[f"grad::{key}"]
            np.testing.assert_allclose(gradient.numpy().reshape(golden.shape), golden, atol=2e-3 * np.abs(golden).max())


def official_gradient(model: BEVFormer, key: str) -> Tensor:
    """Return the flat gradient of an official parameter; query, key and value projections are packed into one, as there."""
    own = dict(model.named_parameters())
    probe = torch.zeros(3, 1) if "in_proj" in key else torch.zeros(1)
    return torch.cat([own[piece].grad.flatten() for piece in KEYS.translate(key, probe, own)])


def training_queue() -> list[Frame]:
    """Return three frames of one scene, with absolute can_bus."""
    boxes, labels = make_gt("micro")
    frames = []
    for frame in range(3):
        images, lidar2img, _ = (tensor[0].numpy() for tensor in inputs(frame, None))
        frames.append(
            Frame(
                token=str(frame),
                scene_token="scene",
                timestamp_us=500_000 * frame,
                images=images,
                lidar2img=lidar2img,
                can_bus=make_can_bus(frame, "micro"),
                boxes=boxes,
                labels=labels,
            )
        )
    return frames


@pytest.mark.parametrize(("shifted", "prefix"), [(False, "train_"), (True, "alias_train_")])
def test_a_training_step_on_a_queue_equals_the_official_one(golden_micro, shifted, prefix):
    model = official_micro(shifted)
    model.train()
    history, current = queue_batch([training_queue()])
    can_bus = torch.cat([*(frame.can_bus for frame in history), current.can_bus])
    close(can_bus, golden_micro["train_can_bus"])
    assert [bool(frame.has_prev) for frame in (*history, current)] == golden_micro["train_prev_exists"].tolist()
    prev_bev, output = training_forward(model, history, current)
    assert model.training and not prev_bev.requires_grad
    if not shifted:
        close(prev_bev[0], golden_micro["train_history_bev"])
    losses = detection_loss(output, current.boxes, current.labels, TrainConfig())
    assert named(losses) == pytest.approx(golden_losses(golden_micro, prefix), rel=1e-5)
    losses.total.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    assert norm == pytest.approx(float(golden_micro[f"{prefix}total_grad_norm"]), rel=1e-3)


def test_matching_costs_equal_the_official_ones(golden_modules):
    logits, code = (torch.from_numpy(array)[-1, 0] for array in make_coder_inputs())
    boxes, labels = make_gt("tiny")
    config = TrainConfig()
    target = encode(torch.from_numpy(boxes))
    np.testing.assert_allclose(config.cls_weight * cls_cost(logits, torch.from_numpy(labels))[::9], golden_modules["cost_cls"], atol=1e-5)
    np.testing.assert_allclose(config.box_weight * box_cost(code, target)[::9], golden_modules["cost_reg"], rtol=1e-5, atol=1e-5)


def test_the_learning_rate_follows_the_official_schedule(golden_modules):
    config = TrainConfig()
    steps_per_epoch = 28130
    epochs = [learning_rate(config, epoch * steps_per_epoch, steps_per_epoch) for epoch in range(24)]
    np.testing.assert_allclose(epochs, golden_modules["lr_epoch_first_iter"], rtol=1e-9)
    warmup = [learning_rate(config, int(step), steps_per_epoch) for step in golden_modules["lr_warmup_iters"]]
    np.testing.assert_allclose(warmup, golden_modules["lr_warmup"], rtol=1e-9)
