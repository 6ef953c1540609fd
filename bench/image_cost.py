"""Measures the time to load the images of one key frame: `python -m bench.image_cost --root data/street`.

The times are CPU milliseconds of one core, for decoding only, and for decoding, scaling, normalising and padding.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2

from bench import report
from qdbev.command import entry_point
from qdbev.data.build_infos import load_or_build
from qdbev.data.config import DataConfig
from qdbev.data.image_transform import image_transform
from qdbev.data.infos import Infos
from qdbev.data.transforms import load_images, read_image


def measure(root: Path, infos: Infos, scale: float, num_frames: int) -> dict[str, float]:
    """Medians in milliseconds over the first `num_frames` key frames, and the number of frames measured, which may be smaller."""
    cv2.setNumThreads(0)
    height, width = infos.image_hw.tolist()
    transform = image_transform(DataConfig(root=str(root), image_scale=scale), (height, width))
    decode, load = [], []
    for index in range(min(num_frames, len(infos))):
        paths = [root / name for name in infos[index].image_files]
        decode.append(_milliseconds(lambda paths=paths: [read_image(path, transform.image_hw) for path in paths]))
        load.append(_milliseconds(lambda paths=paths: load_images(paths, transform)))
    return {"decode_ms": statistics.median(decode), "load_ms": statistics.median(load), "frames": len(load)}


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Measure the time to decode and to prepare the images of a key frame."""
    parser = argparse.ArgumentParser(prog="python -m bench.image_cost", description=main.__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder in nuScenes format")
    parser.add_argument("--version", default="v1.0-trainval", help="folder of tables in it (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=0.5, help="data.image_scale (default: %(default)s, as in the recipe tiny)")
    parser.add_argument("--frames", type=int, default=20, help="key frames to measure (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    infos = load_or_build(DataConfig(root=str(args.root), version=args.version))
    figures = measure(args.root, infos, args.scale, args.frames)
    report.write(args.out, {**figures, "image_hw": infos.image_hw.tolist(), "scale": args.scale})
    sys.stdout.write(f"images of a frame: decode {figures['decode_ms']:.1f} ms, decode and prepare {figures['load_ms']:.1f} ms\n")


if __name__ == "__main__":
    main()
