"""View-guided distillation against loops in double precision, and the properties of each of its forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qdbev.config import TrainConfig
from qdbev.detector import Output
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.quant.config import DistillConfig
from qdbev.schema import Batch
from qdbev.settings import ConfigError
from train.distill import distillation_loss, head_divergence, normalize_weights

B, N, C, Q, LAYERS, CLASSES = 2, 3, 5, 7, 2, 4
LEVELS = ((4, 6), (2, 3))
K = 12
TRAIN = TrainConfig()
RTOL, ATOL = 2e-5, 1e-7  # float32 sums of some hundred terms against double precision
FORMS = ("image", "bev", "product", "guided")
ALL_FORMS = [DistillConfig(form=form) for form in FORMS]
VARIANTS = [*ALL_FORMS, DistillConfig(form="product", head=1.0), DistillConfig(form="guided", head=1.0, temperature=2.0)]


def output(learns: bool = False) -> Output:
    images = tuple(torch.randn(B, N, C, *hw, requires_grad=learns) for hw in LEVELS)
    bev = torch.randn(B, K, C, requires_grad=learns)
    box_code = 3 * torch.randn(LAYERS, B, Q, 10)
    return Output(images, bev, torch.randn(LAYERS, B, Q, CLASSES, requires_grad=learns), box_code.requires_grad_(learns))


def some_visibility() -> Tensor:
    """Return (B, N, K) bool; no camera sees cell 5."""
    visible = torch.rand(B, N, K) < 0.4
    visible[:, :, 5] = False
    return visible


def copied(source: Output) -> Output:
    """Return a student with the same values as `source`."""
    images = tuple(level.detach().clone().requires_grad_(True) for level in source.image_features)
    return Output(images, *(field.detach().clone().requires_grad_(True) for field in source[1:]))


def leaves(out: Output) -> list[Tensor]:
    return [*out.image_features, *out[1:]]


def loss_of(student: Output, teacher: Output, visible: Tensor | None, config: DistillConfig) -> Tensor:
    distillation = distillation_loss(student, teacher, visible, config, TRAIN)
    return distillation.features + distillation.head


def divergences(student: Tensor, teacher: Tensor, config: DistillConfig) -> np.ndarray:
    """Return (C, places) terms p log(p / q) - p + q of one image or BEV (C, places), in double precision."""
    q, p = (np.exp(x.detach().double().numpy() / config.temperature) for x in (student, teacher))
    q, p = q / q.sum(0, keepdims=True), p / p.sum(0, keepdims=True)
    terms = np.zeros(q.shape)
    for c in range(q.shape[0]):
        for place in range(q.shape[1]):
            terms[c, place] = p[c, place] * math.log(p[c, place] / q[c, place]) + q[c, place] - p[c, place]
    return terms


def cameras(student: Output, teacher: Output, config: DistillConfig) -> np.ndarray:
    """Return (B, N) L_img: one number for each camera, averaged over levels."""
    scalars = np.zeros((B, N))
    for b, n in np.ndindex(B, N):
        for level, (h, w) in enumerate(LEVELS):
            pair = (out.image_features[level][b, n].flatten(1) for out in (student, teacher))
            scalars[b, n] += config.temperature**2 / (w * h * C) * divergences(*pair, config).sum() / len(LEVELS)
    return scalars


def truth(student: Output, teacher: Output, visible: Tensor, config: DistillConfig) -> dict[str, float]:
    """Return the feature loss of each form by the equations of the paper and of docs/distillation.md, sample after sample."""
    tau2, seen = config.temperature**2, visible.numpy()
    totals = dict.fromkeys(FORMS, 0.0)
    for b in range(B):
        image = cameras(student, teacher, config)[b]
        bev = tau2 / C * divergences(student.bev[b].T, teacher.bev[b].T, config).sum(0)
        camera_map = [sum(image[n] for n in range(N) if seen[b, n, k]) for k in range(K)]
        seen_cells = [k for k in range(K) if seen[b, :, k].any()]
        mean = sum(camera_map[k] for k in seen_cells) / len(seen_cells)
        weights = [camera_map[k] / mean if k in seen_cells else 1.0 for k in range(K)]
        totals["image"] += image.mean() / B
        totals["bev"] += bev.mean() / B
        totals["product"] += sum(image[n] * seen[b, n, k] * bev[k] for n in range(N) for k in range(K)) / B
        totals["guided"] += sum(weights[k] * bev[k] for k in range(K)) / K / B
    return totals


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_form_is_its_equation(temperature):
    student, teacher, visible = output(), output(), some_visibility()
    config = DistillConfig(temperature=temperature)
    expected = truth(student, teacher, visible, config)
    for form in FORMS:
        distillation = distillation_loss(student, teacher, visible, replace(config, form=form), TRAIN)
        assert distillation.features.item() == pytest.approx(expected[form], rel=RTOL, abs=ATOL), form
        assert distillation.head == 0


def test_a_detector_without_a_bev_learns_from_images_and_every_other_form_is_refused():
    student, teacher = output(), output()
    without = (student._replace(bev=None), teacher._replace(bev=None), None)
    found = distillation_loss(*without, DistillConfig(form="image", head=1.0), TRAIN)
    expected = distillation_loss(student, teacher, some_visibility(), DistillConfig(form="image", head=1.0), TRAIN)
    assert found == expected
    for form in ("bev", "product", "guided"):
        with pytest.raises(ConfigError, match=f"quant.distill.form is '{form}', which needs BEV features; .* choose 'image'"):
            distillation_loss(*without, DistillConfig(form=form), TRAIN)


@pytest.mark.parametrize("config", ALL_FORMS, ids=lambda config: config.form)
def test_a_batch_is_the_mean_of_its_samples(config):
    student, teacher, visible = output(), output(), some_visibility()

    def sample(out: Output, b: int) -> Output:
        return Output(tuple(level[b : b + 1] for level in out.image_features), out.bev[b : b + 1], *(x[:, b : b + 1] for x in out[2:]))

    parts = [loss_of(sample(student, b), sample(teacher, b), visible[b : b + 1], config) for b in range(B)]
    torch.testing.assert_close(loss_of(student, teacher, visible, config), torch.stack(parts).mean())


@pytest.mark.parametrize("config", VARIANTS, ids=repr)
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(config):
    teacher, visible = output(), some_visibility()
    student = copied(teacher)
    loss = loss_of(student, teacher, visible, config)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    for leaf in leaves(student):
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), atol=1e-7, rtol=0)


@pytest.mark.parametrize("form", ["product", "guided"])
def test_the_optimum_of_the_bev_is_the_teacher_however_the_cameras_weight_the_cells(form):
    teacher, visible = output(), some_visibility()
    student = copied(teacher)
    student.image_features[0].data[:, 1] += 3 * torch.randn(B, C, *LEVELS[0])
    loss = loss_of(student, teacher, visible, DistillConfig(form=form))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert student.bev.grad.abs().max() < 1e-7


def test_at_a_high_temperature_the_divergence_is_half_the_variance_of_the_difference():
    student, teacher, visible = output(), output(), some_visibility()
    hot = distillation_loss(student, teacher, visible, DistillConfig(form="bev", temperature=30.0), TRAIN).features
    limit = (student.bev - teacher.bev).var(-1, unbiased=False).mean() / 2 / C
    torch.testing.assert_close(hot, limit, rtol=0.03, atol=0)


def test_the_visibility_is_that_of_spatial_cross_attention():
    config = BEVFormerConfig(embed_dim=8, num_heads=2, num_cameras=N, bev_hw=(6, 5), encoder_layers=1, decoder_layers=1, num_query=4)
    model, image_hw = BEVFormer(config), (96, 160)
    lidar2img = torch.eye(4).repeat(B, N, 1, 1)
    for n in range(N):  # cameras at the origin that look 120 degrees apart
        c, s = math.cos(2.1 * n), math.sin(2.1 * n)
        lidar2img[:, n, :3, :3] = torch.tensor([[100.0, 0, 80], [0, 100, 48], [0, 0, 1]]) @ torch.tensor(
            [[c, -s, 0], [0, 0, -1], [s, c, 0]]
        )
    batch = Batch(torch.zeros(B, N, 3, *image_hw), lidar2img, torch.zeros(B, 18), torch.zeros(B), [], [], [])
    visible = model.visibility(batch)
    assert visible.shape == (B, N, 30)
    assert 0 < visible.float().mean() < 1
    assert torch.equal(visible.float(), model.encoder._views([torch.zeros(B, N, 8, 3, 5)], lidar2img, image_hw).visible)


def test_where_no_camera_sees_anything_the_product_is_zero_and_the_guided_form_weights_all_cells_equally():
    student, teacher, visible = output(learns=True), output(), some_visibility()
    blind = torch.zeros_like(visible)
    product = loss_of(student, teacher, blind, DistillConfig(form="product"))
    product.backward()
    assert product.item() == 0
    for leaf in (*student.image_features, student.bev):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    guided = loss_of(student, teacher, blind, DistillConfig(form="guided"))
    torch.testing.assert_close(guided, loss_of(student, teacher, visible, DistillConfig(form="bev")))


def test_normalized_weights_do_not_depend_on_their_scale_and_are_one_in_cells_that_do_not_count():
    camera_map, seen = torch.rand(B, K), torch.rand(B, K) < 0.7
    weights = normalize_weights(camera_map, seen)
    torch.testing.assert_close(normalize_weights(1e-6 * camera_map, seen), weights)
    for b in range(B):
        torch.testing.assert_close(weights[b][seen[b]], camera_map[b][seen[b]] / camera_map[b][seen[b]].mean())
        assert (weights[b][~seen[b]] == 1).all()
    rounded = torch.tensor([[-1e-9, 3e-9], [-1e-9, -2e-9]])  # divergences of equal features after rounding
    assert normalize_weights(rounded, torch.ones(2, 2).bool()).tolist() == [[0, 2], [1, 1]]


@pytest.mark.parametrize("form", ["product", "guided"])
def test_the_order_of_the_cameras_does_not_matter_and_one_that_sees_nothing_adds_nothing(form):
    student, teacher, visible = output(), output(), some_visibility()
    config = DistillConfig(form=form)
    loss = loss_of(student, teacher, visible, config)

    def turned(out: Output, index: list[int]) -> Output:
        return out._replace(image_features=tuple(level[:, index] for level in out.image_features))

    order = [2, 0, 1]
    torch.testing.assert_close(loss_of(turned(student, order), turned(teacher, order), visible[:, order], config), loss)
    more = torch.cat((visible, torch.zeros_like(visible[:, :1])), 1)
    torch.testing.assert_close(loss_of(turned(student, [0, 1, 2, 1]), turned(teacher, [0, 1, 2, 1]), more, config), loss)


@pytest.mark.parametrize("config", VARIANTS, ids=repr)
def test_each_form_has_gradients_in_its_own_features_and_never_in_the_teacher(config):
    student, teacher = output(learns=True), output(learns=True)
    loss_of(student, teacher, some_visibility(), config).backward()
    assert all(leaf.grad is None for leaf in leaves(teacher))
    images, bev, head = config.form in ("image", "product"), config.form != "image", config.head > 0
    for leaf, learns in zip(leaves(student), (*[images] * len(LEVELS), bev, head, head), strict=True):
        assert learns == (leaf.grad is not None and bool(leaf.grad.abs().max() > 0))


def test_where_all_cameras_differ_equally_and_each_sees_its_own_cells_the_guided_form_is_the_bev_form():
    teacher = output()
    student = copied(teacher)
    student.bev.data += torch.randn(B, K, C)
    for out in (student, teacher):
        for level in out.image_features:
            level.data[:] = level.data[:1, :1].clone()
    student.image_features[0].data += torch.randn(C, *LEVELS[0])
    visible = torch.nn.functional.one_hot(torch.arange(K) % N, N).T.bool().expand(B, -1, -1)
    guided, bev = (loss_of(student, teacher, visible, DistillConfig(form=form)) for form in ("guided", "bev"))
    torch.testing.assert_close(guided, bev)


def test_the_heads_are_compared_query_by_query():
    student, teacher = output(), output()
    layers = []
    for layer in range(LAYERS):
        cls = box = sure = 0.0
        for b, q in np.ndindex(B, Q):
            p, s = (1 / (1 + np.exp(-out.cls_logits[layer, b, q].double().numpy())) for out in (teacher, student))
            cls += (p * np.log(p / s) + (1 - p) * np.log((1 - p) / (1 - s))).sum()
            difference = np.abs((student.box_code - teacher.box_code)[layer, b, q].double().numpy())
            box += p.max() * (difference * np.array(TRAIN.code_weights)).sum()
            sure += p.max()
        layers.append((TRAIN.cls_weight * cls + TRAIN.box_weight * box) / sure)
    assert head_divergence(student, teacher, TRAIN).item() == pytest.approx(np.mean(layers), rel=RTOL)


def test_extreme_features_and_logits_stay_finite():
    student, teacher, visible = output(), output(), some_visibility()
    student = copied(Output(tuple(1e4 * level for level in student.image_features), 1e4 * student.bev, *(100 * x for x in student[2:])))
    for config in VARIANTS:
        loss = loss_of(student, teacher, visible, replace(config, temperature=0.5))
        loss.backward()
        assert loss.isfinite(), config
        assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves(student)), config


@pytest.mark.parametrize("config", VARIANTS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_as_float32(config, dtype):
    def cast(out: Output, dtype: torch.dtype) -> Output:
        return Output(tuple(level.to(dtype) for level in out.image_features), *(field.to(dtype) for field in out[1:]))

    student, teacher, visible = cast(output(), dtype), cast(output(), dtype), some_visibility()
    expected = loss_of(cast(student, torch.float32), cast(teacher, torch.float32), visible, config)
    assert loss_of(student, teacher, visible, config) == expected
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(student, teacher, visible, config)
    assert loss.dtype == torch.float32
    assert loss == expected
