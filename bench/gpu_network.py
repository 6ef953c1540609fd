"""Compares a network on the GPU with itself on the CPU, output by output: `python -m bench.gpu_network --bits w8a8 --out network.json`.

The network is the micro recipe with random weights and runs on two successive frames of noise. On the GPU it runs twice: with PyTorch's
operators, compared with the CPU, and with our kernels, compared with PyTorch's operators.
"""

import argparse
import contextlib
import copy
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.comparison import DISTANCE, TensorDifference, compare, require_same
from eval.open_model import OpenModel
from qdbev import artifact, detectors
from qdbev.command import entry_point, parse_device
from qdbev.config import Config
from qdbev.data.noise_frames import noise_frames
from qdbev.detector import Arrays, Deployed, Detector
from qdbev.recipes import RECIPES, at_bits
from qdbev.schema import Frame

_IMAGE_HW = (96, 160)
"""Padded height and width of the images in pixels, as in the recipe."""
FLOAT = "float"
"""Value of --bits for a network without quantization."""
FLOAT_DISTANCE = 1e-4
"""Largest relative distance between outputs of float networks. For scale: sampling a thousandth of a cell away changes the BEV by 2e-4."""
_WEIGHT_STD = 0.02
"""Standard deviation of the noise added to every weight, because weights that are initialised to zero would hide errors."""
_log = logging.getLogger(__name__)


def noise(config: Config, image_hw: tuple[int, int]) -> tuple[Frame, Frame]:
    """Two successive frames of noise for a network of `config`."""
    return noise_frames(config.data, config.model.num_cameras, image_hw)


def network(bits: str) -> tuple[Config, Deployed]:
    """A config and its deployed network with random weights; the same at every call.

    Args:
        bits: "float", or bits of weights and activations such as "w8a8", at which the network is then calibrated.
    """
    config = RECIPES["micro"]() if bits == FLOAT else at_bits(RECIPES["micro"](), bits)
    torch.manual_seed(0)
    model = detectors.build(config.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=_WEIGHT_STD)
    if bits != FLOAT:
        model = _calibrated(model, config)
    return config, Deployed(model).eval()


def differences(config: Config, deployed: Deployed, target: torch.device, allowed: float) -> list[TensorDifference]:
    """Compare the network on the CPU, with PyTorch's operators on `target`, and with our kernels there, each with the one before.

    Args:
        allowed: Largest relative distance at which outputs count as the same.
    """
    there = copy.deepcopy(deployed).to(target)
    sides = {
        "cpu": _open(config, deployed, torch.inference_mode),
        f"pytorch_{target.type}": _open(config, there, torch.enable_grad),  # our kernels are only used without gradients
        f"kernels_{target.type}": _open(config, there, torch.inference_mode),
    }
    return list(compare(list(sides.items()), noise(config, _IMAGE_HW), allowed))


def worst(rows: Sequence[TensorDifference]) -> list[dict[str, Any]]:
    """Summarise each pair and tensor over the frames: lowest cosine, largest distance and difference, and whether all passed."""
    found = []
    for key in dict.fromkeys((row.model, row.reference, row.tensor) for row in rows):
        mine = [row for row in rows if (row.model, row.reference, row.tensor) == key]
        found.append(
            {
                **dict(zip(("model", "reference", "tensor"), key, strict=True)),
                "cosine": min(row.cosine for row in mine),
                "distance": max(row.distance for row in mine),
                "max_abs": max(row.max_abs for row in mine),
                "passed": all(row.passed for row in mine),
            }
        )
    return found


def save(rows: Sequence[TensorDifference], out: Path) -> None:
    """Write the summary of each tensor as JSON, then raise ComparisonError if a tensor is out of tolerance."""
    found = worst(rows)
    with artifact.atomic(out) as temporary:
        temporary.write_text(json.dumps({"tensors": found}, indent=1) + "\n")
    for row in found:
        _log.info(
            "%(model)s compared with %(reference)s, %(tensor)s: cosine %(cosine).7f, distance %(distance).1e, max abs %(max_abs).1e", row
        )
    require_same(rows)


def _calibrated(model: Detector, config: Config) -> Detector:
    from qdbev.quant.calibrate import calibrate  # imports pytorch-quantization, which a float network does not need
    from qdbev.restore import quantized
    from train.calibration import run_sequences

    student = quantized(config, model)
    calibrate(student, lambda: run_sequences(student, config, [noise(config, _IMAGE_HW)]), config.quant.calibration)
    return student


def _open(config: Config, deployed: Deployed, mode: Callable[[], contextlib.AbstractContextManager[Any]]) -> OpenModel:
    def run(inputs: Arrays) -> Arrays:
        with mode():
            return deployed.run(inputs)

    return OpenModel(config, run)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Compare a network on the GPU with itself on the CPU; fails if an output is out of tolerance."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_network", description=main.__doc__)
    parser.add_argument("--bits", default=FLOAT, help="float, or widths of weights and activations, as w8a8 (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    args = parser.parse_args(argv)
    target = parse_device("cuda")
    from plugins import torch_ops

    torch_ops.install()
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared with float32
    save(differences(*network(args.bits), target, FLOAT_DISTANCE if args.bits == FLOAT else DISTANCE), args.out)


if __name__ == "__main__":
    main()
