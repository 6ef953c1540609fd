"""Packs a student into a small file: `python -m export.pack --student runs/demo/w4a6.pt --packed runs/demo/w4a6.packed.pt`.

Two 4-bit weights take one byte (qdbev/quant/pack.py), and the file can be opened like a checkpoint. It is written only if its outputs on
two frames of noise equal the student's exactly. Sizes and bit operations are printed, ours and as the paper counts them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdbev import artifact, detectors
from qdbev.artifact import ArtifactError, Seal
from qdbev.command import entry_point
from qdbev.config import from_dict
from qdbev.data.noise_frames import noise_frames
from qdbev.detector import Deployed, Detector, run_stream
from qdbev.facts import PackedFacts
from qdbev.quant.bops import bops, costs, float_bops
from qdbev.quant.pack import pack, packed_parts, paper_bytes
from qdbev.restore import PACKED, restore
from qdbev.schema import Frame


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Pack a student."""
    parser = argparse.ArgumentParser("python -m export.pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--packed", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    artifact.require_target(args.packed, args.student)
    artifact.load_checkpoint(args.student, "student")  # raises for other kinds
    seal, student = restore(args.student)
    sys.stdout.write(report(write(student, seal, args.packed)) + "\n")


def write(student: Detector, parent: Seal, path: Path) -> dict[str, Any]:
    """Pack `student`, the content of the checkpoint `parent`, into the file `path`; returns sizes and operations.

    Raises:
        ArtifactError: The seal has no image size, or the outputs of the packed form differ from the student's; no file is left.
    """
    config = from_dict(parent.config)
    if parent.facts.image_hw is None:
        raise ArtifactError(f"the student of {path} does not say its image size (fact image_hw); train it with this version")
    frames = noise_frames(config.data, student.config.num_cameras, parent.facts.image_hw)
    layers = costs(student, lambda: _outputs(student, frames[:1]))
    measured = {
        "parts": packed_parts(student),
        "float_bytes": paper_bytes(student, 32),
        "paper_bytes": paper_bytes(student, config.quant.bits.weight),
        "macs": sum(layer.macs for layer in layers),
        "bops": bops(layers),
        "float_bops": float_bops(layers),
    }
    weights = {PACKED: torch.from_numpy(np.frombuffer(pack(student), np.uint8).copy())}
    facts = PackedFacts(image_hw=parent.facts.image_hw, **measured)
    with artifact.atomic(path) as temporary:
        artifact.save_checkpoint(temporary, config=parent.config, weights=weights, parent=parent, facts=facts)
        _, restored = restore(temporary)
        if not all(np.array_equal(*pair) for pair in zip(_outputs(student, frames), _outputs(restored, frames), strict=True)):
            raise ArtifactError(f"{path}: the packed form does not give the student's outputs; nothing was written")
    return measured | {"bytes": path.stat().st_size}


def report(measured: dict[str, Any]) -> str:
    """Sizes and bit operations, ours and the paper's, as text."""
    sizes = ", ".join(f"{part} {size}" for part, size in measured["parts"].items())
    smaller, cheaper = measured["float_bytes"] / measured["bytes"], measured["float_bops"] / measured["bops"]
    return (
        f"packed file {measured['bytes']} bytes, float32 parameters / {smaller:.2f}\n"
        f"before deflation {sum(measured['parts'].values())}: {sizes}\n"
        f"the paper's count {measured['paper_bytes']:.0f} bytes of {measured['float_bytes']:.0f}\n"
        f"one frame {measured['macs']} multiply-accumulates, {measured['bops']} bit operations, float / {cheaper:.1f}"
    )


@torch.no_grad()
def _outputs(model: Detector, frames: Sequence[Frame]) -> list[np.ndarray]:
    """Deployed outputs of successive frames, each with the memory of the frame before it."""
    steps = run_stream(detectors.stream(model.config), Deployed(model).eval().run, frames)
    return [output for step in steps for output in step.outputs.values()]


if __name__ == "__main__":
    main()
