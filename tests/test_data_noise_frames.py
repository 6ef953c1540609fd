"""The synthetic camera rig has the geometry of nuScenes' vehicle, and frames of noise are the same at every call."""

import numpy as np
import pytest

from qdbev.data import rig
from qdbev.data.config import DataConfig
from qdbev.data.noise_frames import noise_frames


def test_points_ahead_and_behind_are_in_the_middle_of_the_front_and_rear_images():
    matrices = rig.lidar2img(7, 160)
    assert matrices.shape == (7, 4, 4) and np.array_equal(matrices[6], matrices[0])
    for camera, point, depth in ((0, (0, 20, 1.51 - 1.84), 20 + 0.94 - 1.70), (3, (0, -20, 1.58 - 1.84), 20 - 0.94 + 0.03)):
        u, v, w, _ = matrices[camera] @ (*point, 1)
        np.testing.assert_allclose((u / w, v / w, w), (81.6, 49.1, depth), atol=1e-9)


def test_noise_frames_are_successive_and_the_same_at_every_call():
    data = DataConfig(root="", std=(19.0, 19.0, 19.0))
    first, second = noise_frames(data, 2, (32, 64))
    again, _ = noise_frames(data, 2, (32, 64))
    assert np.array_equal(first.images, again.images) and not np.array_equal(first.images, second.images)
    assert first.images.dtype == first.lidar2img.dtype == np.float32
    assert first.images.std() == pytest.approx(57.0 / 19.0, rel=0.02)
    assert first.scene_token == second.scene_token and first.timestamp_us < second.timestamp_us
    assert second.can_bus[0] - first.can_bus[0] == 2.5 and second.can_bus[17] == pytest.approx(2.0)
