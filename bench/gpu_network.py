"""The network on a GPU against the same network on the CPU, output by output: `python -m bench.gpu_network --bits w8a8 --out network.json`.

The micro recipe with random weights, on two successive frames of noise, so that neither a checkpoint nor a dataset is needed. On the GPU
it runs twice: with PyTorch's operators, which is compared with the CPU, and with the kernels, which are compared with that.
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

IMAGE_HW = (96, 160)
"""Of the recipe's images, padded."""
FLOAT = "float"
FLOAT_DISTANCE = 1e-4
"""Of float networks: images changed by one part in a million moved the BEV by 3e-7, sampling a thousandth of a cell beside by 2e-4."""
_WEIGHT_STD = 0.02
"""What is added to every weight: training starts those that move sampling points or weigh them at zero, which would hide mistakes."""
_log = logging.getLogger(__name__)


def noise(config: Config, image_hw: tuple[int, int]) -> tuple[Frame, Frame]:
    """Two successive frames that a network of `config` can run on where there is no data."""
    return noise_frames(config.data, config.model.num_cameras, image_hw)


def network(bits: str) -> tuple[Config, Deployed]:
    """A config and its deployed network with random weights, float or calibrated at bit widths such as "w8a8"; the same at every call."""
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
    """Rows of the CPU, PyTorch on `target`, and the kernels there, each against the one before, with the distance that is allowed."""
    there = copy.deepcopy(deployed).to(target)
    sides = {
        "cpu": _open(config, deployed, torch.inference_mode),
        f"pytorch_{target.type}": _open(config, there, torch.enable_grad),  # with a gradient no kernel is called
        f"kernels_{target.type}": _open(config, there, torch.inference_mode),
    }
    return list(compare(list(sides.items()), noise(config, IMAGE_HW), allowed))


def worst(rows: Sequence[TensorDifference]) -> list[dict[str, Any]]:
    """Of each pair and tensor: lowest cosine, largest distance and difference over the frames, and whether all are within tolerance."""
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
    """Write the worst of each tensor, then raise ComparisonError if one is out of tolerance."""
    found = worst(rows)
    with artifact.atomic(out) as temporary:
        temporary.write_text(json.dumps({"tensors": found}, indent=1) + "\n")
    for row in found:
        _log.info("%(model)s against %(reference)s, %(tensor)s: cosine %(cosine).7f, distance %(distance).1e, max abs %(max_abs).1e", row)
    require_same(rows)


def _calibrated(model: Detector, config: Config) -> Detector:
    from qdbev.quant.calibrate import calibrate  # imports pytorch-quantization, which a float network does not need
    from qdbev.restore import quantized
    from train.calibration import calibration_run

    student = quantized(config, model)
    calibrate(student, calibration_run(student, config, [noise(config, IMAGE_HW)]), config.quant.calibration)
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
