"""Builds the model of a checkpoint. This is the one place where networks and quantization meet."""

from pathlib import Path

from qdbev import artifact, detectors
from qdbev.artifact import ArtifactError, Seal
from qdbev.config import Config, from_dict
from qdbev.detector import Detector
from qdbev.facts import Kind
from qdbev.quant.pack import PackError, unpack
from qdbev.quant.prepare import fold_batch_norm, prepare
from qdbev.settings import ConfigError

PACKED = "packed"
"""Name of the only array of a packed file, uint8."""
_MAX_REASON_LENGTH = 300
"""Characters of torch's message that are shown; it lists every tensor that does not fit, each in a line."""


def restore(path: Path, *kinds: Kind) -> tuple[Seal, Detector]:
    """Open a checkpoint of one of `kinds` (all by default); returns its seal, and its model in evaluation mode on the CPU.

    Raises:
        ArtifactError: The file is missing, damaged, of another kind, or its weights do not fit its config.
    """
    seal, weights, _ = artifact.load_checkpoint(path, *(kinds or ("teacher", "student", "packed")))
    try:
        config = from_dict(seal.config)
    except ConfigError as error:
        raise ArtifactError(f"the config of {path} cannot be read: {error}") from error
    model = detectors.build(config.model) if seal.kind == "teacher" else quantized(config)
    try:
        if seal.kind == "packed":
            unpack(weights[PACKED].numpy().tobytes(), model)
        else:
            model.load_state_dict(weights)
    except (RuntimeError, KeyError, PackError) as error:
        reason = " ".join(str(error).split())[:_MAX_REASON_LENGTH]
        raise ArtifactError(
            f"{path}: weights do not fit the checkpoint's own config; it was altered or made by another version: {reason}"
        ) from error
    return seal, model.eval()


def quantized(config: Config, teacher: Detector | None = None) -> Detector:
    """Return a model with folded batch norm and with quantizers, made of `teacher` (altered in place) or with fresh weights."""
    model = teacher if teacher is not None else detectors.build(config.model)
    fold_batch_norm(model.eval())
    return prepare(model, config.quant)
