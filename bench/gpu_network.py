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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from eval.comparison import DISTANCE, Row, compare, require_same
from eval.open_model import Detector
from qdbev import artifact
from qdbev.artifact import Seal
from qdbev.command import device, entry_point
from qdbev.config import Config, to_dict
from qdbev.data.noise_frames import noise_frames
from qdbev.detectors.bevformer.model import BEVFormer, Deployed
from qdbev.recipes import at_bits, micro
from qdbev.schema import INPUTS, OUTPUTS, Frame

IMAGE_HW = (96, 160)
"""Of the recipe's images, padded."""
FLOAT = "float"
FLOAT_DISTANCE = 1e-4
"""Of float networks: images changed by one part in a million moved the BEV by 3e-7, sampling a thousandth of a cell beside by 2e-4."""
_WEIGHT_STD = 0.02
"""What is added to every weight: training starts those that move sampling points or weigh them at zero, which would hide mistakes."""
_log = logging.getLogger(__name__)


class Two(NamedTuple):
    """Two frames, as `eval.loop` takes a dataset."""

    frames: tuple[Frame, Frame]

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, index: int) -> Frame:
        """Frame 0 or 1."""
        return self.frames[index]


def noise(config: Config, image_hw: tuple[int, int]) -> Two:
    """What a network of `config` can run on where there is no data."""
    return Two(noise_frames(config.data, config.model.num_cameras, image_hw))


def network(bits: str) -> tuple[Config, nn.Module]:
    """The deployed graph with random weights, of `FLOAT` numbers or calibrated at widths like "w8a8"; the same one at every call."""
    config = micro() if bits == FLOAT else at_bits(micro(), bits)
    torch.manual_seed(0)
    model = BEVFormer(config.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=_WEIGHT_STD)
    if bits != FLOAT:
        model = _calibrated(model, config)
    return config, Deployed(model).eval()


def differences(config: Config, deployed: nn.Module, target: torch.device, allowed: float) -> list[Row]:
    """Rows of the CPU, PyTorch on `target`, and the kernels there, each against the one before, with the distance that is allowed."""
    there = copy.deepcopy(deployed).to(target)
    sides = {
        "cpu": _detector(config, deployed, torch.device("cpu"), torch.inference_mode),
        f"pytorch_{target.type}": _detector(config, there, target, torch.enable_grad),  # with a gradient no kernel is called
        f"kernels_{target.type}": _detector(config, there, target, torch.inference_mode),
    }
    return list(compare(list(sides.items()), noise(config, IMAGE_HW), allowed))


def worst(rows: Sequence[Row]) -> list[dict[str, Any]]:
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


def save(rows: Sequence[Row], out: Path) -> None:
    """Write the worst of each tensor, then raise ComparisonError if one is out of tolerance."""
    found = worst(rows)
    with artifact.atomic(out) as temporary:
        temporary.write_text(json.dumps({"tensors": found}, indent=1) + "\n")
    for row in found:
        _log.info("%(model)s against %(reference)s, %(tensor)s: cosine %(cosine).7f, distance %(distance).1e, max abs %(max_abs).1e", row)
    require_same(rows)


def _calibrated(model: BEVFormer, config: Config) -> BEVFormer:
    from qdbev.quant.calibrate import calibrate
    from qdbev.restore import quantized  # takes pytorch-quantization along, which a float network need not

    student = quantized(config, model)
    alone = Deployed(student).eval()
    detector = _detector(config, alone, torch.device("cpu"), torch.no_grad)

    def run() -> None:
        for _ in compare([("calibration", detector), ("calibration", detector)], noise(config, IMAGE_HW)):
            pass

    calibrate(student, run, config.quant.calibration)
    return student


def _detector(
    config: Config, deployed: nn.Module, target: torch.device, mode: Callable[[], contextlib.AbstractContextManager[Any]]
) -> Detector:
    def infer(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with mode():
            outputs: tuple[Tensor, ...] = deployed(*(torch.from_numpy(inputs[name]).to(target) for name in INPUTS))
        return {name: tensor.detach().cpu().numpy() for name, tensor in zip(OUTPUTS, outputs, strict=True)}

    return Detector(Seal(kind="teacher", config=to_dict(config), parent=None, facts={}, made={}), config, infer)


@entry_point
def main() -> None:
    """Compare a network on the GPU with itself on the CPU; fails if an output is out of tolerance."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_network", description=main.__doc__)
    parser.add_argument("--bits", default=FLOAT, help="float, or widths of weights and activations, as w8a8 (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    args = parser.parse_args()
    target = device("cuda")
    from plugins import torch_ops

    torch_ops.install()
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared with float32
    save(differences(*network(args.bits), target, FLOAT_DISTANCE if args.bits == FLOAT else DISTANCE), args.out)


if __name__ == "__main__":
    main()
