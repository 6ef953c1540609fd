"""A checkpoint or packed file to a model that runs: the one place where model and quantization meet."""

from pathlib import Path

from qdbev import artifact, detectors
from qdbev.artifact import ArtifactError, Seal
from qdbev.config import Config, from_dict
from qdbev.detector import Detector
from qdbev.quant.pack import PackError, unpack
from qdbev.quant.prepare import fold_batch_norm, prepare

PACKED = "packed"
"""Name of the one array of a packed file, uint8."""


def restore(path: Path) -> tuple[Seal, Detector]:
    """Seal and model, in evaluation mode on the CPU, of a teacher (float), a student (quantized) or a packed student.

    Raises:
        ArtifactError: The file is missing, damaged, of another kind, or its weights do not fit its config.
    """
    seal, weights, _ = artifact.load_checkpoint(path, "teacher", "student", "packed")
    config = from_dict(seal.config)
    model = detectors.build(config.model) if seal.kind == "teacher" else quantized(config)
    try:
        if seal.kind == "packed":
            unpack(weights[PACKED].numpy().tobytes(), model)
        else:
            model.load_state_dict(weights)
    except (RuntimeError, KeyError, PackError) as error:
        raise ArtifactError(
            f"{path}: weights do not fit the checkpoint's own config; it was altered or made by another version: {error}"
        ) from error
    return seal, model.eval()


def quantized(config: Config, teacher: Detector | None = None) -> Detector:
    """A model with batch norm folded and quantizers in place, of `teacher`'s weights (altered in place) or fresh ones."""
    model = teacher if teacher is not None else detectors.build(config.model)
    fold_batch_norm(model.eval())
    return prepare(model, config.quant)
