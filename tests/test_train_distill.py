"""View-guided distillation against loops in double precision, and what each of its forms promises."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qdbev.config import TrainConfig
from qdbev.detector import Output
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.detectors.bevformer.encoder import Encoder
from qdbev.geometry import pillar_points
from qdbev.quant.config import DistillConfig
from train.distill import Sight, carry, distillation_loss, head_divergence, look, mean_one, object_map, visible_cells

B, N, C, Q, LAYERS, CLASSES, HEIGHTS = 2, 3, 5, 7, 2, 4, 2
LEVELS = ((4, 6), (2, 3))
BEV_HW = (3, 4)
K = BEV_HW[0] * BEV_HW[1]
TRAIN = TrainConfig()
RTOL, ATOL = 2e-5, 1e-7  # float32 sums of some hundred terms against double precision
FORMS = ("image", "bev", "sum", "product", "guided")
ALL_FORMS = [DistillConfig(form=form) for form in FORMS]
VARIANTS = [
    *ALL_FORMS,
    DistillConfig(form="guided", axis="space"),
    DistillConfig(form="product", image_map="pixel", foreground=0.5, head=1.0),
    DistillConfig(form="guided", image_map="pixel", foreground=0.5, head=1.0),
]


def output(learns: bool = False) -> Output:
    images = tuple(torch.randn(B, N, C, *hw, requires_grad=learns) for hw in LEVELS)
    bev = torch.randn(B, K, C, requires_grad=learns)
    box_code = 3 * torch.randn(LAYERS, B, Q, 10)
    return Output(images, bev, torch.randn(LAYERS, B, Q, CLASSES, requires_grad=learns), box_code.requires_grad_(learns))


def some_sight() -> Sight:
    """Cells 2 m apart; every fourth pillar point is hit, and cell 5 is seen by no camera."""
    hit = torch.rand(B, N, K, HEIGHTS) < 0.25
    hit[:, :, 5] = False
    return Sight(pillar_points(BEV_HW, 1, (-4.0, -3.0, -5.0, 4.0, 3.0, 3.0))[0, :, :2], torch.rand(B, N, K, HEIGHTS, 2), hit)


def copied(source: Output) -> Output:
    """The same values as a student of its own."""
    images = tuple(level.detach().clone().requires_grad_(True) for level in source.image_features)
    return Output(images, *(field.detach().clone().requires_grad_(True) for field in source[1:]))


def leaves(out: Output) -> list[Tensor]:
    return [*out.image_features, *out[1:]]


def loss_of(student: Output, teacher: Output, seen: Sight, config: DistillConfig) -> Tensor:
    distillation = distillation_loss(student, teacher, seen, config, TRAIN)
    return distillation.features + distillation.head


def divergences(student: Tensor, teacher: Tensor, config: DistillConfig) -> np.ndarray:
    """(C, places) terms p log(p / q), generalised if asked, of one image or BEV (C, places), in double precision."""
    q, p = (np.exp(x.detach().double().numpy() / config.temperature) for x in (student, teacher))
    axis = 0 if config.axis == "channel" else 1
    q, p = q / q.sum(axis, keepdims=True), p / p.sum(axis, keepdims=True)
    terms = np.zeros(q.shape)
    for c in range(q.shape[0]):
        for place in range(q.shape[1]):
            terms[c, place] = p[c, place] * math.log(p[c, place] / q[c, place])
            if config.generalized:
                terms[c, place] += q[c, place] - p[c, place]
    return terms


def cameras(student: Output, teacher: Output, config: DistillConfig) -> np.ndarray:
    """(B, N) L_img: one number a camera, averaged over levels."""
    scalars = np.zeros((B, N))
    for b, n in np.ndindex(B, N):
        for level, (h, w) in enumerate(LEVELS):
            pair = (out.image_features[level][b, n].flatten(1) for out in (student, teacher))
            scalars[b, n] += config.temperature**2 / (w * h * C) * divergences(*pair, config).sum() / len(LEVELS)
    return scalars


def truth(student: Output, teacher: Output, seen: Sight, config: DistillConfig) -> dict[str, float]:
    """The features of each form by the equations of the paper and of docs/distillation.md, sample after sample."""
    tau2, visible = config.temperature**2, seen.hit.any(-1).numpy()
    totals = dict.fromkeys(FORMS, 0.0)
    for b in range(B):
        image = cameras(student, teacher, config)[b]
        bev = tau2 / C * divergences(student.bev[b].T, teacher.bev[b].T, config).sum(0)
        camera_map = [sum(image[n] for n in range(N) if visible[b, n, k]) for k in range(K)]
        seen_cells = [k for k in range(K) if visible[b, :, k].any()]
        mean = sum(camera_map[k] for k in seen_cells) / len(seen_cells)
        weights = [camera_map[k] / mean if k in seen_cells else 1.0 for k in range(K)]
        totals["image"] += image.mean() / B
        totals["bev"] += bev.mean() / B
        totals["product"] += sum(image[n] * visible[b, n, k] * bev[k] for n in range(N) for k in range(K)) / B
        totals["guided"] += sum(weights[k] * bev[k] for k in range(K)) / K / B
    totals["sum"] = totals["image"] + totals["bev"]
    return totals


@pytest.mark.parametrize("generalized", [True, False])
@pytest.mark.parametrize("axis", ["channel", "space"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_form_is_its_equation(axis, temperature, generalized):
    student, teacher, seen = output(), output(), some_sight()
    config = DistillConfig(axis=axis, temperature=temperature, generalized=generalized)
    expected = truth(student, teacher, seen, config)
    for form in FORMS:
        distillation = distillation_loss(student, teacher, seen, replace(config, form=form), TRAIN)
        assert distillation.features.item() == pytest.approx(expected[form], rel=RTOL, abs=ATOL), form
        assert distillation.image.mean().item() == pytest.approx(expected["image"], rel=RTOL)
        assert distillation.bev.item() == pytest.approx(expected["bev"], rel=RTOL, abs=ATOL)
        assert distillation.head == 0


def test_each_camera_is_logged_in_its_place():
    teacher, seen = output(), some_sight()
    student = copied(teacher)
    student.image_features[1].data[:, 2] += torch.randn(B, C, *LEVELS[1])
    image = distillation_loss(student, teacher, seen, DistillConfig(), TRAIN).image
    assert image[2] > 0.01
    torch.testing.assert_close(image[:2], torch.zeros(2), atol=1e-7, rtol=0)


@pytest.mark.parametrize("config", ALL_FORMS, ids=lambda config: config.form)
def test_a_batch_is_the_mean_of_its_samples(config):
    student, teacher, seen = output(), output(), some_sight()

    def sample(out: Output, b: int) -> Output:
        return Output(tuple(level[b : b + 1] for level in out.image_features), out.bev[b : b + 1], *(x[:, b : b + 1] for x in out[2:]))

    parts = [
        loss_of(sample(student, b), sample(teacher, b), Sight(seen.cells, seen.points[b : b + 1], seen.hit[b : b + 1]), config)
        for b in range(B)
    ]
    torch.testing.assert_close(loss_of(student, teacher, seen, config), torch.stack(parts).mean())


@pytest.mark.parametrize("config", VARIANTS, ids=repr)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(config):
    teacher, seen = output(), some_sight()
    student = copied(teacher)
    loss = loss_of(student, teacher, seen, config)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    for leaf in leaves(student):
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), atol=1e-7, rtol=0)


def bev_gradient(config: DistillConfig, shift: Tensor | None = None) -> tuple[float, float]:
    """Loss and largest gradient where the student's BEV is the teacher's, plus `shift` (B, K, C), and the images differ."""
    teacher, seen = output(), some_sight()
    student = copied(teacher)
    student.image_features[0].data[:, 1] += 3 * torch.randn(B, C, *LEVELS[0])
    if shift is not None:
        student.bev.data += shift
    loss = loss_of(student, teacher, seen, config)
    loss.backward()
    return loss.item(), student.bev.grad.abs().max().item()


@pytest.mark.parametrize("form", ["product", "guided"])
def test_plain_divergence_over_space_has_its_optimum_elsewhere_and_each_remedy_puts_it_back(form):
    plain = DistillConfig(form=form, axis="space", generalized=False)
    assert bev_gradient(plain)[1] > 1e-4
    for remedy in (replace(plain, generalized=True), replace(plain, axis="channel"), replace(plain, axis="channel", generalized=True)):
        loss, gradient = bev_gradient(remedy)
        assert loss == pytest.approx(0, abs=1e-7)
        assert gradient < 1e-7


def test_the_misplaced_optimum_is_the_teacher_times_the_map():
    teacher, seen = output(), some_sight()
    student = copied(teacher)
    student.image_features[0].data[:, 1] += 3 * torch.randn(B, C, *LEVELS[0])
    seen.hit[:, 0] = True  # so that no cell has weight zero, whose optimum would be the logarithm of nothing
    student.image_features[1].data[:, 0] += torch.randn(B, C, *LEVELS[1])
    plain = DistillConfig(form="guided", axis="space", generalized=False)
    scalars = torch.from_numpy(cameras(student, teacher, plain)).float()
    weights = mean_one((scalars[..., None] * visible_cells(seen)).sum(1), visible_cells(seen).any(1))
    student.bev.data += weights.log()[..., None]  # softmax of log(w p) is w p, normalised
    loss = loss_of(student, teacher, seen, plain)
    loss.backward()
    assert loss.item() < -1e-3
    torch.testing.assert_close(student.bev.grad, torch.zeros_like(student.bev), atol=1e-7, rtol=0)
    assert loss_of(student, teacher, seen, replace(plain, generalized=True)).item() > 1e-3


def test_the_hot_limit_is_half_the_variance_of_the_difference():
    student, teacher, seen = output(), output(), some_sight()
    hot = distillation_loss(student, teacher, seen, DistillConfig(form="bev", temperature=30.0), TRAIN).features
    limit = (student.bev - teacher.bev).var(-1, unbiased=False).mean() / 2 / C
    torch.testing.assert_close(hot, limit, rtol=0.03, atol=0)


def test_the_map_is_that_of_spatial_cross_attention():
    model = BEVFormerConfig(embed_dim=8, num_heads=2, num_cameras=N, bev_hw=(6, 5), encoder_layers=1)
    encoder, image_hw = Encoder(model), (96, 160)
    lidar2img = torch.eye(4).repeat(B, N, 1, 1)
    for n in range(N):  # cameras at the origin that look 120 degrees apart
        c, s = math.cos(2.1 * n), math.sin(2.1 * n)
        lidar2img[:, n, :3, :3] = torch.tensor([[100.0, 0, 80], [0, 100, 48], [0, 0, 1]]) @ torch.tensor(
            [[c, -s, 0], [0, 0, -1], [s, c, 0]]
        )
    features = [torch.zeros(B, N, 8, 3, 5)]
    visible = visible_cells(look(encoder.pillars, lidar2img, image_hw))
    assert visible.shape == (B, N, 30)
    assert 0 < visible.float().mean() < 1
    assert torch.equal(visible.float(), encoder._views(features, lidar2img, image_hw).visible)
    torch.testing.assert_close(
        look(encoder.pillars, lidar2img, image_hw).cells[7], torch.tensor([-51.2 + 2.5 * 20.48, -51.2 + 1.5 * 102.4 / 6])
    )


@pytest.mark.parametrize("image_map", ["camera", "pixel"])
def test_where_no_camera_sees_anything_the_product_is_zero_and_the_guided_form_counts_all_cells_alike(image_map):
    student, teacher, seen = output(learns=True), output(), some_sight()
    blind = seen._replace(hit=torch.zeros_like(seen.hit), points=torch.full_like(seen.points, 1e8))
    product = loss_of(student, teacher, blind, DistillConfig(form="product", image_map=image_map))
    product.backward()
    assert product.item() == 0
    for leaf in (*student.image_features, student.bev):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    guided = loss_of(student, teacher, blind, DistillConfig(form="guided", image_map=image_map))
    torch.testing.assert_close(guided, loss_of(student, teacher, seen, DistillConfig(form="bev")))


def test_the_guided_map_keeps_its_weight_whatever_its_scale_and_leaves_unseen_cells_alone():
    camera_map, seen = torch.rand(B, K), torch.rand(B, K) < 0.7
    weights = mean_one(camera_map, seen)
    torch.testing.assert_close(mean_one(1e-6 * camera_map, seen), weights)
    for b in range(B):
        torch.testing.assert_close(weights[b][seen[b]], camera_map[b][seen[b]] / camera_map[b][seen[b]].mean())
        assert (weights[b][~seen[b]] == 1).all()
    rounded = torch.tensor([[-1e-9, 3e-9], [-1e-9, -2e-9]])  # divergences of nothing
    assert mean_one(rounded, torch.ones(2, 2).bool()).tolist() == [[0, 2], [1, 1]]


@pytest.mark.parametrize("form", ["product", "guided"])
def test_the_order_of_the_cameras_does_not_matter_and_one_that_sees_nothing_adds_nothing(form):
    student, teacher, seen = output(), output(), some_sight()
    config = DistillConfig(form=form)
    loss = loss_of(student, teacher, seen, config)

    def turned(out: Output, index: list[int]) -> Output:
        return out._replace(image_features=tuple(level[:, index] for level in out.image_features))

    order = [2, 0, 1]
    shuffled = Sight(seen.cells, seen.points[:, order], seen.hit[:, order])
    torch.testing.assert_close(loss_of(turned(student, order), turned(teacher, order), shuffled, config), loss)
    more = Sight(seen.cells, seen.points[:, [0, 1, 2, 0]], torch.cat((seen.hit, torch.zeros_like(seen.hit[:, :1])), 1))
    torch.testing.assert_close(loss_of(turned(student, [0, 1, 2, 1]), turned(teacher, [0, 1, 2, 1]), more, config), loss)


@pytest.mark.parametrize("config", VARIANTS, ids=repr)
def test_gradients_go_where_the_form_says_and_never_to_the_teacher(config):
    student, teacher = output(learns=True), output(learns=True)
    loss_of(student, teacher, some_sight(), config).backward()
    assert all(leaf.grad is None for leaf in leaves(teacher))
    images, bev, head = config.form in ("image", "sum", "product"), config.form != "image", config.head > 0
    for leaf, learns in zip(leaves(student), (*[images] * len(LEVELS), bev, head, head), strict=True):
        assert learns == (leaf.grad is not None and bool(leaf.grad.abs().max() > 0))


def test_the_pixel_map_is_read_at_the_pillar_points_and_averaged_over_those_seen():
    seen = some_sight()
    levels = [torch.rand(B, N, *hw) for hw in LEVELS]
    carried = carry(levels, seen)
    for b, n, k in np.ndindex(B, N, K):
        values = [
            sum(bilinear(level[b, n].numpy(), *seen.points[b, n, k, d].tolist()) for level in levels) / len(levels)
            for d in range(HEIGHTS)
            if seen.hit[b, n, k, d]
        ]
        assert carried[b, n, k].item() == pytest.approx(np.mean(values) if values else 0.0, rel=1e-4, abs=1e-6)


def bilinear(image: np.ndarray, u: float, v: float) -> float:
    """Value at normalised (u, v), pixel centres at half-integers, the border continued."""
    h, w = image.shape
    x, y = np.clip(u * w - 0.5, 0, w - 1), np.clip(v * h - 0.5, 0, h - 1)
    x0, y0 = min(int(x), w - 2), min(int(y), h - 2)
    fx, fy = x - x0, y - y0
    top = image[y0, x0] * (1 - fx) + image[y0, x0 + 1] * fx
    return float(top * (1 - fy) + (image[y0 + 1, x0] * (1 - fx) + image[y0 + 1, x0 + 1] * fx) * fy)


def test_the_pixel_map_teaches_the_cells_whose_pixels_differ():
    teacher, seen = output(), some_sight()
    student = copied(teacher)
    student.image_features[0].data[:, 0, :, :2, :3] += torch.randn(B, C, 2, 3)  # top left quarter of the first camera
    student.bev.data += torch.randn(B, K, C)
    seen.hit[:] = False
    seen.hit[:, 0, :2, 0] = True
    seen.points[:, 0, 0, 0], seen.points[:, 0, 1, 0] = 0.2, 0.8
    loss_of(student, teacher, seen, DistillConfig(form="product", image_map="pixel")).backward()
    size = student.bev.grad.abs().amax((0, 2))
    assert size[0] > 1e-4
    assert size[1:].max() < 1e-8


def test_where_every_camera_differs_alike_and_sees_its_own_cells_the_guided_form_is_the_bev_form():
    teacher, seen = output(), some_sight()
    student = copied(teacher)
    student.bev.data += torch.randn(B, K, C)
    for out in (student, teacher):
        for level in out.image_features:
            level.data[:] = level.data[:1, :1].clone()
    student.image_features[0].data += torch.randn(C, *LEVELS[0])
    seen.hit[:] = torch.nn.functional.one_hot(torch.arange(K) % N, N).T[..., None].bool()
    guided, bev = (loss_of(student, teacher, seen, DistillConfig(form=form)) for form in ("guided", "bev"))
    torch.testing.assert_close(guided, bev)


def test_the_object_map_is_the_surest_query_over_a_gaussian_of_the_box():
    teacher, cells = output(), some_sight().cells
    objects = object_map(teacher, cells)
    for b, k in np.ndindex(B, K):
        best = 0.0
        for q in range(Q):
            x, y, log_w, log_l = teacher.box_code[-1, b, q, :4].tolist()
            variance = max(math.exp(log_w + log_l) / 4, 2.0**2)
            distance2 = (cells[k, 0].item() - x) ** 2 + (cells[k, 1].item() - y) ** 2
            sure = max(1 / (1 + math.exp(-logit)) for logit in teacher.cls_logits[-1, b, q].tolist())
            best = max(best, sure * math.exp(-distance2 / 2 / variance))
        assert objects[b, k].item() == pytest.approx(best, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("form", ["bev", "sum", "product", "guided"])
def test_foreground_moves_weight_to_the_teachers_objects_and_keeps_its_sum(form):
    teacher, seen = output(), some_sight()
    teacher.cls_logits[:] = -20
    teacher.cls_logits[-1, :, 0, 1] = 2
    teacher.box_code[-1, :, 0, :4] = torch.tensor((*seen.cells[6].tolist(), 0.0, 0.0))
    student = copied(output())

    def gradient(foreground: float) -> Tensor:
        student.bev.grad = None
        loss_of(student, teacher, seen, DistillConfig(form=form, foreground=foreground)).backward()
        return student.bev.grad.norm(dim=-1)

    ratio = gradient(0.5) / gradient(0.0).clamp(min=1e-12)
    counted = gradient(0.0) > 0
    for b in range(B):
        assert ratio[b].argmax() == 6
        assert ratio[b, counted[b]].min() >= 0.5 - 1e-4
    if form == "bev":
        torch.testing.assert_close(ratio.mean(1), torch.ones(B))


def test_the_head_follows_query_by_query():
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
    student, teacher, seen = output(), output(), some_sight()
    student = copied(Output(tuple(1e4 * level for level in student.image_features), 1e4 * student.bev, *(100 * x for x in student[2:])))
    for config in (*VARIANTS, DistillConfig(form="product", axis="space", generalized=False)):
        loss = loss_of(student, teacher, seen, replace(config, temperature=0.5))
        loss.backward()
        assert loss.isfinite(), config
        assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves(student)), config


@pytest.mark.parametrize("config", VARIANTS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_as_float32(config, dtype):
    def cast(out: Output, dtype: torch.dtype) -> Output:
        return Output(tuple(level.to(dtype) for level in out.image_features), *(field.to(dtype) for field in out[1:]))

    student, teacher, seen = cast(output(), dtype), cast(output(), dtype), some_sight()
    expected = loss_of(cast(student, torch.float32), cast(teacher, torch.float32), seen, config)
    assert loss_of(student, teacher, seen, config) == expected
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(student, teacher, seen, config)
    assert loss.dtype == torch.float32
    assert loss == expected
