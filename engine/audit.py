"""Which layer of an engine really runs in which precision.

    python -m engine.audit --engine runs/demo/w8a8.engine --onnx runs/demo/w8a8.onnx

TensorRT falls back to floating point without a word where it has no integer kernel for what the ONNX asks. This compares each product
of the ONNX with the kernel that computes it, fails if a quantized one runs in float, and says of every other why it is meant to. It
needs no GPU: the layer table is written beside the engine when that is built.
"""

import argparse
import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine import layer_table, onnx_products
from engine.backend import EngineError
from engine.layer_table import Layer
from engine.onnx_products import Product, Role
from qdbev import artifact, deployed_graph
from qdbev.command import entry_point

_log = logging.getLogger(__name__)
_COMPUTE_KINDS = ("gemm", "correlation", "conv", "matrixmultiply", "mha")
"""Parts of the names of kernels that multiply and accumulate. Kernels generated around a product (kgen, runtime_fusion) are not among
them: they convert INT8 operands to float first (seen in TensorRT-RTX 1.7.1)."""
_FLOATS = ("FP32", "FP16", "BF16")
_FELL_BACK = "fell back"
_WANTED: dict[Role, str] = {
    "policy": "policy: the ONNX gives it float operands",
    "geometry": "geometry: depends on calibration and motion alone",
    "constant": "constant: depends on no input",
}
_SHOWN = 12


@dataclass(frozen=True)
class Row:
    """One product of the ONNX, and what became of it. `reason` is empty where a quantized one runs in INT8."""

    name: str
    op: str
    flops: int
    wanted: Literal["INT8", "float"]
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
    """Products that the ONNX quantizes."""
    float_rows: tuple[Row, ...]
    """Products that it does not."""

    @property
    def offenders(self) -> list[Row]:
        """Quantized layers that do not run in INT8."""
        return [row for row in self.rows if row.got != row.wanted]

    @property
    def int8_flops_fraction(self) -> float:
        """Share of INT8 in the operations of all products but geometry; 0 where there are none."""
        geometry = sum(row.flops for row in self.float_rows if row.reason == _WANTED["geometry"])
        return self._int8_flops / max(self._flops - geometry, 1)

    @property
    def summary(self) -> str:
        """One line for people."""
        total = len(self.rows)
        return (
            f"{total - len(self.offenders)} of {total} quantized layers run INT8, {self.int8_flops_fraction:.2%} of FLOPs but geometry; "
            f"{self.kernels} kernels, {self.int8_kernels} of them integer products, {self.requantizations} requantizations"
        )

    def facts(self) -> dict[str, object]:
        """Numbers for the engine's seal. `float_layers` are all that do not run in INT8, first those that should."""
        return {
            "quantized_layers": len(self.rows),
            "int8_layers": len(self.rows) - len(self.offenders),
            "kernels": self.kernels,
            "int8_kernels": self.int8_kernels,
            "requantizations": self.requantizations,
            "int8_flops": self._int8_flops,
            "float_flops": self._flops - self._int8_flops,
            "int8_flops_fraction": self.int8_flops_fraction,
            "float_layers": [_float_layer(row) for row in (*self.offenders, *self.float_rows)],
        }

    @property
    def _flops(self) -> int:
        return sum(row.flops for row in (*self.rows, *self.float_rows))

    @property
    def _int8_flops(self) -> int:
        return self._flops - sum(row.flops for row in (*self.offenders, *self.float_rows))


def audit(wanted: list[Product], table: list[Layer]) -> Report:
    """Compare the products of an ONNX with an engine's layer table."""
    kernels = [layer for layer in table if layer.is_kernel]
    return Report(
        kernels=len(kernels),
        int8_kernels=sum(map(is_integer_product, kernels)),
        requantizations=sum("INT8" in layer.outputs and not is_product(layer) for layer in kernels),
        rows=tuple(_row(product, kernels) for product in wanted if product.role == "quantized"),
        float_rows=tuple(_float_row(product, kernels) for product in wanted if product.role != "quantized"),
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
    rows = [dataclasses.asdict(row) for row in (*report.rows, *report.float_rows)]
    content = {"summary": report.summary, **report.facts(), "rows": rows, "made": artifact.provenance()}
    with artifact.atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def require_int8(report: Report) -> None:
    """Raise EngineError, naming the layer_table, if a quantized layer runs in float."""
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
    table = layer_table.load(layer_table.table_path(engine), engine_seal.facts.layer_table_sha256)
    products = onnx_products.products(deployed_graph.load(onnx_path), engine_seal.facts.interface.geometry)
    return audit(products, table)


def report_path(engine: Path) -> Path:
    """Where the audit of `engine` lies."""
    return engine.with_name(engine.name + ".audit.json")


def _row(wanted: Product, kernels: list[Layer]) -> Row:
    """What became of a quantized product."""
    named = [layer for layer in kernels if wanted.name in layer.nodes]
    integer = next(filter(is_integer_product, named), None)
    if integer is not None:
        return _of(wanted, "INT8", "INT8", integer.name, "")
    if not named:
        return _of(wanted, "INT8", "absent", "", wanted.problem or "no kernel names it; was the node renamed, or folded into a constant?")
    layer = next(filter(is_product, named), named[-1])
    operands = ", ".join(layer.inputs + layer.constants)
    reason = wanted.problem or f"TensorRT chose kernel {layer.tactic or layer.kind} on {operands}"
    return _of(wanted, "INT8", (layer.outputs or ("float",))[0], layer.name, reason)


def _float_row(wanted: Product, kernels: list[Layer]) -> Row:
    """What became of a product meant to run in float; `got` is the type of its operands."""
    named = [layer for layer in kernels if wanted.name in layer.nodes]
    if not named:
        return _of(wanted, "float", "absent", "", _WANTED[wanted.role])
    layer = next(filter(is_product, named), named[0])
    got = next((kind for kind in layer.inputs + layer.constants if kind in _FLOATS), "float")
    return _of(wanted, "float", got, layer.name, _WANTED[wanted.role])


def _of(product: Product, wanted: Literal["INT8", "float"], got: str, engine_layer: str, reason: str) -> Row:
    return Row(name=product.name, op=product.op, flops=product.flops, wanted=wanted, got=got, engine_layer=engine_layer, reason=reason)


def _float_layer(row: Row) -> dict[str, object]:
    reason = f"{_FELL_BACK}: {row.reason}" if row.wanted == "INT8" else row.reason
    return {"name": row.name, "op": row.op, "flops": row.flops, "precision": row.got, "reason": reason}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.audit", description="Which layer of an engine runs in which precision.")
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--onnx", type=Path, required=True, help="the file the engine was built from")
    parser.add_argument("--out", type=Path, help="report as JSON (default: beside the engine)")
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Engine in, report out; fails if a quantized layer runs in float."""
    args = parse_args(argv)
    report = of_files(args.engine, args.onnx)
    save(args.out or report_path(args.engine), report)
    require_int8(report)
    _log.info("%s", report.summary)


if __name__ == "__main__":
    main()
