"""The generated weights and inputs are those that the official code was given, and the golden files can be made again."""

import hashlib
import json

import numpy as np
import pytest
from golden import compact
from golden_files import FOLDER, arrays, input_checksums, key_shapes
from golden_inputs import (
    fill_value,
    make_can_bus,
    make_coder_inputs,
    make_dcn_inputs,
    make_gt,
    make_images,
    make_lidar2img,
    make_msda_inputs,
    make_raw_images,
    make_rotate_input,
)


def checksum(array: np.ndarray) -> str:
    """Return the first 16 digits of the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def weights_checksum(network: str) -> str:
    """Return the checksum of all weights of a network: keys and values in alphabetical order."""
    digest = hashlib.sha256()
    for key, shape in sorted(key_shapes(network).items()):
        digest.update(key.encode())
        digest.update(fill_value(key, shape).tobytes())
    return digest.hexdigest()[:16]


def recorded(prefix: str) -> dict[str, str]:
    """Return the recorded checksums whose name begins with `prefix`."""
    return {name: value for name, value in input_checksums().items() if name.startswith(prefix)}


@pytest.mark.parametrize("network", ["tiny", "micro"])
def test_weights_images_cameras_and_boxes_are_those_of_the_official_run(network):
    found = {
        f"{network}/state_dict": weights_checksum(network),
        f"{network}/lidar2img": checksum(make_lidar2img(network).astype(np.float32)),
    }
    for frame in range(3):
        found[f"{network}/img{frame}"] = checksum(make_images(network, frame))
        found[f"{network}/can_bus{frame}"] = checksum(make_can_bus(frame, network).astype(np.float32))
    found[f"{network}/gt_boxes"], found[f"{network}/gt_labels"] = map(checksum, make_gt(network))
    assert found == recorded(f"{network}/")


def test_inputs_of_single_modules_are_those_of_the_official_run():
    msda = make_msda_inputs()
    official_names = {"value": "value", "level_hw": "spatial_shapes", "locations": "sampling_locations", "weights": "attention_weights"}
    found = {f"msda/{official_names[name]}": checksum(array) for name, array in msda.items()}
    found["coder/cls"], found["coder/box"] = map(checksum, make_coder_inputs())
    found |= {"rotate": checksum(make_rotate_input()), "dcn_x": checksum(make_dcn_inputs()), "raw_images": checksum(make_raw_images())}
    assert found == {name: value for name, value in input_checksums().items() if not name.startswith(("tiny/", "micro/"))}


def test_every_golden_array_is_finite_and_the_files_are_small():
    for name in ("micro", "modules"):
        for key, array in arrays(name).items():
            assert array.size > 0, key
            assert array.dtype.kind in "biU" or np.isfinite(array).all(), key
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 3_000_000


def test_compact_keeps_every_used_value_and_writes_the_same_bytes_again(tmp_path):
    source = tmp_path / "full"
    source.mkdir()
    given = {"f0_stage1": np.float32([1 / 3, -1e-30]), "names": np.array(["a", "bc"]), "count": np.int64(7)}
    unused = dict.fromkeys(compact.UNUSED, np.zeros(3))
    for name in ("micro", "modules"):
        np.savez(source / f"golden_{name}.npz", **given, **unused)
    for name in compact.NETWORKS:
        (source / f"keys_{name}.json").write_text(json.dumps({f"{name}.weight": [2, 3], "a": []}))
    (source / "checksums.txt").write_text("micro/img0 float32 2x3 0123\nmicro_base/img0 float32 2x3 4567\nrotate float32 3 89ab\n")
    for target in ("one", "two"):
        (tmp_path / target).mkdir()
        compact.write(source, tmp_path / target)
    for name in ("micro", "modules"):
        with np.load(tmp_path / "one" / f"{name}.npz") as kept:
            assert sorted(kept.files) == sorted(given)
            assert all(kept[key].dtype == array.dtype and (kept[key] == array).all() for key, array in given.items())
    assert (tmp_path / "one/checksums.txt").read_text() == "micro/img0 float32 2x3 0123\nrotate float32 3 89ab\n"
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / target).iterdir()} for target in ("one", "two"))
    assert one == two and len(one) == 4
