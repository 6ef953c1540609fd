"""Exports a checkpoint to ONNX: traces it, packs its weights, compares it with PyTorch and seals the file.

    python -m export.to_onnx --checkpoint runs/demo/w4a6.pt --onnx runs/demo/w4a6.onnx

A float checkpoint gives a float graph, a quantized one an integer graph; with weights of 4 bits or fewer, the packed storage form is
written beside it as `.int4.onnx`. Nothing is written unless the graph agrees with PyTorch.
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import onnx_ir as ir

from export import deform_conv, parity, qdq
from export.constants import fold_constant_products
from export.float16 import to_float16
from export.integer_value import feed_int8_values
from export.projection import expand_projection
from export.runner import LITERAL, OnnxRunner
from export.trace import trace
from qdbev import artifact
from qdbev.artifact import ArtifactError, Seal
from qdbev.command import entry_point
from qdbev.config import Config, from_dict
from qdbev.data.noise_frames import noise_frames
from qdbev.deployed_graph import DeployedGraphError
from qdbev.detector import Detector
from qdbev.facts import OnnxFacts
from qdbev.restore import restore
from qdbev.schema import Frame, Interface

_INT4_BITS = 4


class ParityError(ValueError):
    """The ONNX does not compute what the checkpoint computes."""


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Export a checkpoint."""
    parser = argparse.ArgumentParser("python -m export.to_onnx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="teacher or student, .pt")
    parser.add_argument("--onnx", type=Path, required=True, help="file to write; its seal goes beside it")
    parser.add_argument(
        "--standard-deform-conv", action="store_true", help="float DCNv2 as ONNX's own DeformConv (opset 19); TensorRT-RTX has none"
    )
    parser.add_argument("--float16", action="store_true", help="float part in float16; geometry, inputs and outputs stay float32")
    parser.add_argument("--image-hw", type=int, nargs=2, metavar=("H", "W"), help="padded input size; default: that of the training")
    args = parser.parse_args(argv)
    artifact.require_target(args.onnx, args.checkpoint)
    seal, model = restore(args.checkpoint)
    image_hw = _image_hw(args.checkpoint, seal, args.image_hw)
    frames = noise_frames(from_dict(seal.config).data, model.config.num_cameras, image_hw)
    rows, sealed = export(model, seal, args.onnx, image_hw, frames, args.standard_deform_conv, args.float16)
    facts = sealed.facts
    sys.stdout.write(f"{parity.table(rows)}\n{args.onnx}: {facts.nodes} nodes, {facts.bytes} bytes, opset {facts.opset}, ")
    sys.stdout.write(f"traced in {facts.trace_s} s\n")


def export(
    model: Detector,
    parent: Seal,
    path: Path,
    image_hw: tuple[int, int],
    frames: Sequence[Frame],
    standard_deform_conv: bool = False,
    float16: bool = False,
) -> tuple[list[parity.OutputParity], Seal]:
    """Write and seal the ONNX of `model`, the content of the checkpoint `parent`; returns its parity with PyTorch and its seal.

    Args:
        frames: Consecutive frames of one scene on which PyTorch and ONNX are compared.
        standard_deform_conv: Deformable convolutions become ONNX's own nodes (deform_conv.py).
        float16: The float part becomes float16, except geometry (float16.py).

    Raises:
        ValueError: `standard_deform_conv` or `float16` does not fit the model.
        PassError: A pass over the graph left something that it exists to remove; no file is written.
        ParityError: ONNX and PyTorch differ; the message contains the table, and no file is written.
        ArtifactError: The graph cannot be run, for example because weights are NaN; no file is written.
    """
    config = from_dict(parent.config)
    quantized = parent.kind != "teacher"
    interface = model.interface(image_hw)
    start = time.perf_counter()
    graph = trace(model, image_hw)
    passes = {"packed_weights": qdq.pack_weights(graph), "early_clips": qdq.clip_early(graph)}
    if standard_deform_conv:
        passes["standard_deform_convs"] = deform_conv.use_standard_node(graph)
    graph.metadata_props["onnxruntime_session_options"] = LITERAL
    stored = qdq.pack_int4(graph) if quantized and _has_4_bit_weights(config) else None
    passes |= optimize(graph, interface, float16)
    trace_s = round(time.perf_counter() - start, 1)
    storage = path.with_suffix(".int4.onnx")
    with ExitStack() as files:
        temporary = files.enter_context(artifact.atomic(path))
        ir.save(graph, temporary)
        runner = _open(temporary, path, interface)
        rows = parity.measure(model, runner, frames, parity.FLOAT16_CHANGE if float16 else parity.SUM_ORDER_CHANGE if quantized else None)
        if not all(row.passed for row in rows):
            raise ParityError(f"the ONNX of {parent.kind} {config.name} does not compute what PyTorch computes:\n{parity.table(rows)}")
        if stored is not None:
            ir.save(stored, files.enter_context(artifact.atomic(storage)))
    int4_size = None if stored is None else storage.stat().st_size
    facts = OnnxFacts(
        interface=interface,
        bytes=path.stat().st_size,
        opset=graph.opset_imports[""],
        nodes=len(graph.graph),
        float16=float16,
        passes=passes,
        trace_s=trace_s,
        peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        int4_bytes=int4_size,
        parity=parity.worst(rows),
    )
    sealed = artifact.seal(path, config=parent.config, parent=parent, facts=facts)
    if stored is not None:
        artifact.seal(storage, config=parent.config, parent=sealed, facts=OnnxFacts(interface=interface, bytes=int4_size))
    return rows, sealed


def optimize(graph: ir.Model, interface: Interface, float16: bool = False) -> dict[str, int]:
    """Turn the traced and packed graph into the deployed one, in place; returns how many places each pass changed.

    Raises:
        PassError: A pass left something that it exists to remove.
    """
    done = {
        "constant_products": fold_constant_products(graph),
        "projections": expand_projection(graph, interface.geometry),
        "int8_values": feed_int8_values(graph),
    }
    if float16:
        done["float16_nodes"] = to_float16(graph, interface)
    return done


def _image_hw(checkpoint: Path, seal: Seal, given: list[int] | None) -> tuple[int, int]:
    """Padded image size: `given` if it is set, else that in the checkpoint's seal."""
    found = given or seal.facts.image_hw
    if found is None:
        raise ArtifactError(f"{checkpoint} does not say its image size (fact image_hw); give it, for example --image-hw 480 800")
    if len(found) != 2 or min(found) < 1:
        raise ArtifactError(f"image size {found}: expected a height and a width in pixels")
    return int(found[0]), int(found[1])


def _open(temporary: Path, path: Path, interface: Interface) -> OnnxRunner:
    """Open the file `temporary`; errors name `path` instead, the file that the user asked for."""
    try:
        return OnnxRunner(temporary, interface)
    except (ArtifactError, DeployedGraphError) as error:
        raise type(error)(str(error).replace(str(temporary), str(path))) from error


def _has_4_bit_weights(config: Config) -> bool:
    quant = config.quant
    bits = [quant.bits, quant.edge, *(entry.bits for entry in (*quant.group_bits, *quant.layer_bits))]
    return min([entry.weight for entry in bits] + [quant.embedding_bits or _INT4_BITS + 1]) <= _INT4_BITS


if __name__ == "__main__":
    main()
