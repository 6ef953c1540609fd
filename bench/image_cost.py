"""Measures the time to load the images of one key frame: `python -m bench.image_cost --root data/street`.

The times are CPU milliseconds of one core, for decoding only, and for decoding, scaling (as in the recipe tiny), normalising and padding.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import cv2

from bench import report
from qdbev import artifact
from qdbev.command import entry_point
from qdbev.data.build_infos import load_or_build
from qdbev.data.config import DataConfig
from qdbev.data.image_transform import image_transform
from qdbev.data.transforms import load_images, read_image


def measure(data: DataConfig, num_frames: int) -> dict[str, Any]:
    """Medians in milliseconds over the first `num_frames` key frames, and the number of frames measured, which may be smaller."""
    cv2.setNumThreads(0)
    infos = load_or_build(data)
    height, width = infos.image_hw.tolist()
    transform = image_transform(data, (height, width))
    decode_ms, load_ms = [], []
    for index in range(min(num_frames, len(infos))):
        paths = [Path(data.root) / name for name in infos[index].image_files]
        start = time.process_time()
        for path in paths:
            read_image(path, transform.image_hw)
        decoded = time.process_time()
        load_images(paths, transform)
        decode_ms.append(1e3 * (decoded - start))
        load_ms.append(1e3 * (time.process_time() - decoded))
    medians = {"decode_ms": statistics.median(decode_ms), "load_ms": statistics.median(load_ms)}
    return {**medians, "frames": len(load_ms), "image_hw": [height, width], "scale": data.image_scale}


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Measure the time to decode and to prepare the images of a key frame."""
    parser = argparse.ArgumentParser(prog="python -m bench.image_cost", description=main.__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder in nuScenes format")
    parser.add_argument("--frames", type=int, default=20, help="key frames to measure (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    artifact.require_target(args.out)
    figures = measure(DataConfig(root=str(args.root)), args.frames)
    report.write(args.out, figures)
    sys.stdout.write(f"images of a frame: decode {figures['decode_ms']:.1f} ms, decode and prepare {figures['load_ms']:.1f} ms\n")


if __name__ == "__main__":
    main()
