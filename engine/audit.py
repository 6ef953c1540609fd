"""Which layer of an engine really runs in which precision.

    python -m engine.audit --engine runs/demo/w8a8.engine --onnx runs/demo/w8a8.onnx

TensorRT falls back to floating point without a word where it has no integer kernel for what the ONNX asks. This compares each layer
the ONNX quantizes with the kernel that computes it, and fails if one runs in float. It needs no GPU: the layer table is written
beside the engine when that is built.
"""

import argparse
import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from engine import graph, layers
from engine.backend import EngineError
from engine.graph import QuantizedLayer
from engine.layers import Layer
from qdbev import artifact
from qdbev.command import entry_point

_log = logging.getLogger(__name__)
_COMPUTE_KINDS = ("gemm", "correlation", "conv", "matrixmultiply", "mha")
"""Parts of the names of kernels that multiply and accumulate. Kernels generated around a product (kgen, runtime_fusion) are not among
them: they convert INT8 operands to float first (seen in TensorRT-RTX 1.7.1)."""
_SHOWN = 12


@dataclass(frozen=True)
class Row:
    """One layer the ONNX quantizes, and what became of it. `reason` is empty where `got` is `wanted`."""

    name: str
    op: str
    wanted: str
    got: str
    engine_layer: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The whole engine. `requantizations` are the kernels other than products that write INT8."""

    kernels: int
    int8_kernels: int
    requantizations: int
    rows: tuple[Row, ...]

    @property
    def offenders(self) -> list[Row]:
        """Quantized layers that do not run in INT8."""
        return [row for row in self.rows if row.got != row.wanted]

    @property
    def summary(self) -> str:
        """One line for people."""
        total = len(self.rows)
        return (
            f"{total - len(self.offenders)} of {total} quantized layers run INT8; "
            f"{self.kernels} kernels, {self.int8_kernels} of them integer products, {self.requantizations} requantizations"
        )

    def facts(self) -> dict[str, object]:
        """Numbers for the engine's seal."""
        return {
            "quantized_layers": len(self.rows),
            "int8_layers": len(self.rows) - len(self.offenders),
            "kernels": self.kernels,
            "int8_kernels": self.int8_kernels,
            "requantizations": self.requantizations,
            "float_layers": {row.name: row.reason for row in self.offenders},
        }


def audit(wanted: list[QuantizedLayer], table: list[Layer]) -> Report:
    """Compare what the ONNX quantizes with an engine's layer table."""
    kernels = [layer for layer in table if layer.is_kernel]
    return Report(
        kernels=len(kernels),
        int8_kernels=sum(map(is_integer_product, kernels)),
        requantizations=sum("INT8" in layer.outputs and not is_product(layer) for layer in kernels),
        rows=tuple(_row(layer, kernels) for layer in wanted),
    )


def is_product(layer: Layer) -> bool:
    """Whether the kernel is a convolution or matrix product of TensorRT's own library."""
    text = layer.kind.lower() + (" mha" if "mha" in layer.name.lower() else "")
    return any(kind in text for kind in _COMPUTE_KINDS)


def is_integer_product(layer: Layer) -> bool:
    """Whether it multiplies INT8 with INT8. Operands are inputs, then constants; scales, bias and a fused residual may follow."""
    operands = layer.inputs + layer.constants
    return is_product(layer) and operands[:1] == ("INT8",) and operands.count("INT8") >= 2


def save(path: Path, report: Report) -> None:
    """Write the report as JSON."""
    content = {"summary": report.summary, **report.facts(), "rows": [dataclasses.asdict(row) for row in report.rows]}
    with artifact.atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def require_int8(report: Report) -> None:
    """Raise EngineError, naming the layers, if a quantized layer runs in float."""
    if not report.offenders:
        return
    lines = [f"  {row.name} ({row.op}): {row.got} in {row.engine_layer or 'no kernel'}: {row.reason}" for row in report.offenders[:_SHOWN]]
    if len(report.offenders) > _SHOWN:
        lines.append(f"  and {len(report.offenders) - _SHOWN} more, all in the report")
    raise EngineError("\n".join([report.summary, f"{len(report.offenders)} quantized layers silently run in float:", *lines]))


def of_files(engine: Path, onnx_path: Path) -> Report:
    """Audit a built engine against the ONNX it was built from.

    Raises:
        ArtifactError: One is missing, damaged, or the engine was built from another ONNX.
        EngineError: The layer table is missing or not the engine's.
    """
    engine_seal = artifact.unseal(engine, "engine")
    artifact.expect_parent(engine, engine_seal, onnx_path, artifact.unseal(onnx_path, "onnx"))
    table = layers.load(layers.table_path(engine), engine_seal.facts["layer_table_sha256"])
    return audit(graph.quantized_layers(graph.load(onnx_path)), table)


def report_path(engine: Path) -> Path:
    """Where the audit of `engine` lies."""
    return engine.with_name(engine.name + ".audit.json")


def _row(wanted: QuantizedLayer, kernels: list[Layer]) -> Row:
    named = [layer for layer in kernels if wanted.name in layer.nodes]
    integer = next(filter(is_integer_product, named), None)
    if integer is not None:
        return Row(name=wanted.name, op=wanted.op, wanted="INT8", got="INT8", engine_layer=integer.name, reason="")
    if not named:
        reason = wanted.problem or "no kernel names it; was the node renamed, or folded into a constant?"
        return Row(name=wanted.name, op=wanted.op, wanted="INT8", got="absent", engine_layer="", reason=reason)
    layer = next(filter(is_product, named), named[-1])
    operands = ", ".join(layer.inputs + layer.constants)
    reason = wanted.problem or f"TensorRT chose kernel {layer.tactic or layer.kind} on {operands}"
    return Row(name=wanted.name, op=wanted.op, wanted="INT8", got=(layer.outputs or ("float",))[0], engine_layer=layer.name, reason=reason)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.audit", description="Which layer of an engine runs in which precision.")
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--onnx", type=Path, required=True, help="the file the engine was built from")
    parser.add_argument("--out", type=Path, help="report as JSON (default: beside the engine)")
    return parser.parse_args(arguments)


@entry_point
def main(arguments: list[str] | None = None) -> None:
    """Engine in, report out; fails if a quantized layer runs in float."""
    args = parse_args(arguments)
    report = of_files(args.engine, args.onnx)
    save(args.out or report_path(args.engine), report)
    require_int8(report)
    _log.info("%s", report.summary)


if __name__ == "__main__":
    main()
