"""The parts of a synthetic scene: roads, placement of objects, shapes, drawing order, lidar and visibility."""

import dataclasses

import cv2
import numpy as np
import pytest

from qdbev.data.rig import LIDAR, View, make_sensor, view_from
from synthetic.actors import Actor
from synthetic.boxes import Boxes, box_corners, footprints, outlines_overlap
from synthetic.classes import CLASSES
from synthetic.config import micro, street
from synthetic.lidar import sweep
from synthetic.painter import clip_near, gather_quads, paint, visible_order
from synthetic.road import Road
from synthetic.solids import Solid, make_solid
from synthetic.street import build_street
from synthetic.visibility import count_pixels, level_token


def _front_view(width: int = 320) -> View:
    return view_from(make_sensor("CAM_FRONT", width), np.zeros(3), 0.0)


@pytest.mark.parametrize("curvature", [0.0, 0.01, -0.01])
def test_a_road_has_the_given_length_and_curvature(curvature: float) -> None:
    road = Road((3.0, 4.0), 0.5, curvature)
    points = road.point(np.linspace(0, 100, 10_001))
    steps = np.diff(points, axis=0)
    assert np.linalg.norm(steps, axis=1).sum() == pytest.approx(100, abs=1e-3)
    np.testing.assert_allclose(np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))[-1], road.heading(100.0), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(road.point(7.0, 2.0) - road.point(7.0)), 2.0)


@pytest.mark.parametrize("heading", [0.0, 0.7, np.pi / 2, np.pi])
def test_an_object_moves_at_its_speed_towards_its_heading(heading: float) -> None:
    wlh = CLASSES["pedestrian"].wlh
    actor = Actor("pedestrian", wlh, (5.0, 8.0), 2.0, heading, "pedestrian.moving", make_solid("pedestrian", wlh, (1, 2, 3)))
    points, yaws = actor.ground_pose(Road((0.0, 0.0), 0.3, 0.01), np.array([0.0, 1e-3]))
    step = (points[1] - points[0]) / 1e-3
    assert np.linalg.norm(step) == pytest.approx(2.0, rel=1e-3)
    np.testing.assert_allclose([np.cos(yaws[0]), np.sin(yaws[0])], step / 2.0, atol=1e-3)


@pytest.mark.parametrize("config", [micro(), dataclasses.replace(street(), num_samples=6)], ids=lambda config: config.name)
def test_no_two_objects_ever_overlap(config: object) -> None:
    scene = build_street(config, "scene-0001")
    for t in scene.key_times:
        outlines = footprints(*scene.actor_boxes(t))
        overlap = outlines_overlap(outlines[:, None], outlines[None])
        np.fill_diagonal(overlap, False)
        assert not overlap.any()


def test_rectangles_that_cross_overlap_and_those_apart_do_not() -> None:
    wlh = np.array([1.0, 4.0, 1.0])
    cross = [footprints(np.zeros(2), np.array(yaw), wlh) for yaw in (0.0, np.pi / 2)]
    assert outlines_overlap(*cross)
    corner = footprints(np.array([2.2, 1.2]), np.array(np.pi / 4), wlh)
    assert not outlines_overlap(cross[1], footprints(np.array([3.0, 0.0]), np.array(0.0), wlh))
    assert outlines_overlap(cross[0], corner)


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("rider", [None, (1, 2, 3)])
def test_a_solid_fills_its_box_and_stays_inside(class_name: str, rider: tuple[int, int, int] | None) -> None:
    wlh = CLASSES[class_name].wlh
    solid = make_solid(class_name, wlh, (10, 20, 30), rider)
    blocks = np.concatenate([quad.corners for quad in solid.quads if not quad.is_decal])
    half = np.array([wlh[1], wlh[0], wlh[2]]) / 2
    assert (np.abs(blocks) <= half + 1e-9).all()
    assert (np.ptp(blocks, axis=0) > 0.8 * 2 * half).all()


@pytest.mark.parametrize("class_name", [name for name in CLASSES if name not in ("traffic_cone", "barrier")])
def test_front_and_back_look_different(class_name: str) -> None:
    wlh = CLASSES[class_name].wlh
    quads = gather_quads([make_solid(class_name, wlh, (90, 90, 90))])
    images = []
    for yaw in (0.0, np.pi):
        image = np.zeros((180, 320, 3), np.uint8)
        where = Boxes(np.array([[12.0, 0.0, wlh[2] / 2]]), np.array([yaw]), np.array([wlh]))
        paint(image, _front_view(), quads, np.array([0]), where)
        images.append(image.astype(int))
    drawn = (images[0] > 0).any(-1) | (images[1] > 0).any(-1)
    different = np.abs(images[0] - images[1]).max(-1) > 40
    assert different.sum() > 0.05 * drawn.sum()


def test_a_near_small_object_is_drawn_before_a_long_one_whose_centre_is_nearer_but_which_hides_it() -> None:
    """A bus along the road hides a car behind it, although the car's centre is closer to the camera."""
    bus, car = (2.9, 12.0, 3.5), (1.9, 4.6, 1.7)
    where = Boxes(np.array([[14.0, 2.0, 1.75], [11.0, 5.5, 0.85]]), np.zeros(2), np.array([bus, car]))
    view = _front_view()
    distance = np.linalg.norm(where.centres - view.position, axis=1)
    assert distance[1] < distance[0]
    assert visible_order(view, 320, where).tolist() == [1, 0]


def test_objects_behind_the_camera_or_beside_the_image_or_far_away_are_not_drawn() -> None:
    centres = np.array([[10.0, 0, 0.5], [-10.0, 0, 0.5], [10.0, 20.0, 0.5], [200.0, 0, 0.5]])
    where = Boxes(centres, np.zeros(4), np.ones((4, 3)))
    assert visible_order(_front_view(), 320, where).tolist() == [0]


def test_a_polygon_is_clipped_at_the_near_plane() -> None:
    square = np.array([[-1.0, 0, 1.3], [1.0, 0, 1.3], [1.0, 0, -0.7], [-1.0, 0, -0.7]])
    clipped = clip_near(square)
    assert clipped[:, 2].min() == pytest.approx(0.3)
    assert len(clipped) == 4
    assert len(clip_near(square - (0, 0, 5))) == 0


def test_a_block_is_drawn_at_its_pinhole_projection() -> None:
    solid = Solid()
    solid.block((0, 0, 0), (1.0, 2.0, 1.5), (0, 0, 255))
    where = Boxes(np.array([[15.0, 1.0, 0.75]]), np.array([0.3]), np.array([[2.0, 1.0, 1.5]]))
    view, image = _front_view(), np.zeros((180, 320, 3), np.uint8)
    paint(image, view, gather_quads([solid]), np.array([0]), where)
    corners = box_corners(*where)[0]
    points = (corners - view.position) @ view.global_from_sensor @ view.intrinsic.T
    expected = np.zeros((180, 320), np.uint8)
    cv2.fillConvexPoly(expected, cv2.convexHull(np.round(points[:, :2] / points[:, 2:]).astype(np.int32)), 1)
    drawn = image.any(-1)
    assert (drawn != expected.astype(bool)).sum() < 0.12 * expected.sum()


def _lidar_view() -> View:
    return view_from(make_sensor(LIDAR, 320), np.zeros(3), 0.0)


def test_lidar_points_are_on_the_box_they_are_counted_for_or_on_the_ground() -> None:
    centre, yaw, wlh = np.array([12.0, 3.0, 0.9]), 0.4, np.array([1.9, 4.6, 1.8])
    view = _lidar_view()
    points, counts = sweep(view, Boxes(centre[None], np.array([yaw]), wlh[None]), 1084, np.random.default_rng(0))
    in_global = points[:, :3] @ view.global_from_sensor.T + view.position
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    local = (in_global - centre) @ turn
    half = wlh[[1, 0, 2]] / 2
    on_box = (np.abs(local) <= half + 0.08).all(1) & (in_global[:, 2] > 0.08)
    assert counts.shape == (1,)
    assert abs(int(on_box.sum()) - int(counts[0])) <= 0.05 * counts[0]
    assert counts[0] > 100
    assert np.abs(in_global[~on_box, 2]).max() < 0.1


def test_a_hidden_box_has_no_lidar_points() -> None:
    centres = np.array([[8.0, 0, 2.0], [12.0, 0, 0.5], [-12.0, 0, 0.5]])
    wlh = np.array([[6.0, 1.0, 4.0], [0.4, 0.4, 1.0], [0.4, 0.4, 1.0]])
    _, counts = sweep(_lidar_view(), Boxes(centres, np.zeros(3), wlh), 1084, np.random.default_rng(0))
    assert counts[0] > 0
    assert counts[1] == 0
    assert counts[2] > 0


def test_visibility_is_the_fraction_that_nearer_boxes_do_not_hide() -> None:
    centres = np.array([[20.0, 0.0, 1.0], [10.0, 0.75, 0.5], [20.0, 50.0, 1.0]])
    wlh = np.array([[3.0, 1.0, 2.0], [1.5, 1.0, 3.0], [1.0, 1.0, 1.0]])
    visible, total = count_pixels(_front_view(), (180, 320), [0, 1], Boxes(centres, np.zeros(3), wlh))
    fractions = visible / np.maximum(total, 1)
    assert 0.4 < fractions[0] < 0.6
    assert fractions[1] == 1.0
    assert fractions[2] == 0.0
    assert [level_token(fraction) for fraction in (0.0, 0.39, 0.4, 0.7, 1.0)] == ["1", "1", "2", "3", "4"]
