"""Names for synthetic scenes, from the official nuScenes splits.

The official evaluation selects the scenes of `train` and `val` by name, so synthetic scenes have to use these names. The ranges below are
contiguous parts of the official lists without the scenes 161-176 and 309-314, which the CAN bus reader of nuscenes-devkit 1.2.0 refuses.
"""

_TRAIN_RANGES = ((1, 2), (4, 11), (19, 34), (41, 76), (120, 135), (138, 139), (149, 152), (154, 155), (157, 160),
                 (177, 185), (187, 188), (190, 196), (202, 204), (206, 214), (224, 264), (283, 306), (347, 386))  # fmt: skip
_VAL_RANGES = ((12, 18), (92, 110), (268, 278), (519, 524), (552, 565), (632, 638), (780, 784), (794, 800), (904, 917))


def _names(ranges: tuple[tuple[int, int], ...]) -> tuple[str, ...]:
    return tuple(f"scene-{number:04d}" for first, last in ranges for number in range(first, last + 1))


TRAIN_NAMES = _names(_TRAIN_RANGES)
VAL_NAMES = _names(_VAL_RANGES)
