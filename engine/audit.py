"""Audits the precision in which each layer of an engine really runs.

    python -m engine.audit --engine runs/demo/w8a8.engine --onnx runs/demo/w8a8.onnx

TensorRT falls back to floating point without a message where it has no integer kernel for a quantized layer. The audit compares each
convolution and matrix product of the ONNX with the kernel that computes it. It fails if a quantized product runs in float, and gives the
reason for every product that is meant to. It needs no GPU: it reads the layer table that is written beside the engine.
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
_COMPUTE_KINDS = ("gemm", "correlation", "conv", "matrixmultiply", "mha", "fullyconnected", "matmul")
"""Words in the kinds of kernels that multiply and accumulate. The kinds of generated kernels (kgen, runtime_fusion) are left out, because
such kernels convert INT8 operands to float first (seen in TensorRT-RTX 1.7.1)."""
_FLOATS = ("FP32", "FP16", "BF16")
"""Floating-point types as layer tables name them."""
_FLOAT_REASONS: dict[Role, str] = {
    "policy": "policy: the ONNX gives it float operands",
    "geometry": "geometry: depends on calibration and motion alone",
    "constant": "constant: depends on no input",
}
"""Reason why a product that the ONNX does not quantize is meant to run in float."""
_SHOWN = 12
"""Number of layers that an error message lists."""


@dataclass(frozen=True)
class ProductAudit:
    """The audit of one convolution or matrix product of the ONNX; the first three fields are those of `Product`."""

    name: str
    op: str
    flops: int
    wanted: Literal["INT8", "float"]
    """The precision that the ONNX asks for."""
    got: str
    """The type in which the engine computes it, such as INT8 or FP16; "absent" if no kernel names the node."""
    engine_layer: str
    """Name of the kernel; empty if there is none."""
    reason: str
    """Why the product runs in float; empty for a quantized product that runs in INT8."""


@dataclass(frozen=True)
class Report:
    """The audit of a whole engine."""

    kernels: int
    int8_kernels: int
    """Kernels that multiply INT8 with INT8."""
    requantizations: int
    """Kernels that write INT8 without being a product."""
    rows: tuple[ProductAudit, ...]
    """Products that the ONNX quantizes."""
    float_rows: tuple[ProductAudit, ...]
    """Products that the ONNX leaves in float."""

    @property
    def offenders(self) -> list[ProductAudit]:
        """Quantized products that do not run in INT8."""
        return [row for row in self.rows if row.got != row.wanted]

    @property
    def int8_flops_fraction(self) -> float:
        """Share of INT8 in the operations of all products except geometry; 0 if there are none."""
        geometry = sum(row.flops for row in self.float_rows if row.reason == _FLOAT_REASONS["geometry"])
        return self._int8_flops / max(self._flops - geometry, 1)

    @property
    def summary(self) -> str:
        """The counts as one line of text."""
        total = len(self.rows)
        return (
            f"{total - len(self.offenders)} of {total} quantized layers run INT8, {self.int8_flops_fraction:.2%} of FLOPs except geometry; "
            f"{self.kernels} kernels, {self.int8_kernels} of them integer products, {self.requantizations} requantizations"
        )

    def facts(self) -> dict[str, object]:
        """Counts for the engine's seal. `float_layers` lists all products in float, those first that should run in INT8."""
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
    rows = [_audit(product, kernels) for product in wanted]
    return Report(
        kernels=len(kernels),
        int8_kernels=sum(map(is_integer_product, kernels)),
        requantizations=sum("INT8" in layer.outputs and not is_product(layer) for layer in kernels),
        rows=tuple(row for row in rows if row.wanted == "INT8"),
        float_rows=tuple(row for row in rows if row.wanted == "float"),
    )


def is_product(layer: Layer) -> bool:
    """Return whether the kernel is a convolution or matrix product of TensorRT's own library."""
    text = layer.kind.lower() + (" mha" if "mha" in layer.name.lower() else "")
    return any(kind in text for kind in _COMPUTE_KINDS)


def is_integer_product(layer: Layer) -> bool:
    """Return whether the kernel multiplies INT8 with INT8. Its operands are the first inputs and constants; scales and others follow."""
    operands = layer.inputs + layer.constants
    return is_product(layer) and operands[:1] == ("INT8",) and operands.count("INT8") >= 2


def save(path: Path, report: Report) -> None:
    """Write a report as JSON."""
    rows = [dataclasses.asdict(row) for row in (*report.rows, *report.float_rows)]
    content = {"summary": report.summary, **report.facts(), "rows": rows, "made": artifact.provenance()}
    with artifact.atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def require_int8(report: Report) -> None:
    """Raise EngineError, with the names of the layers, if a quantized layer runs in float."""
    if not report.offenders:
        return
    lines = [f"  {row.name} ({row.op}): {row.got} in {row.engine_layer or 'no kernel'}: {row.reason}" for row in report.offenders[:_SHOWN]]
    if len(report.offenders) > _SHOWN:
        lines.append(f"  and {len(report.offenders) - _SHOWN} more, all in the report")
    raise EngineError("\n".join([report.summary, f"{len(report.offenders)} quantized layers silently run in float:", *lines]))


def audit_files(engine: Path, onnx_path: Path) -> Report:
    """Audit a built engine against the ONNX it was built from.

    Raises:
        ArtifactError: A file is missing or damaged, or the engine was built from another ONNX.
        EngineError: The layer table is missing or belongs to another engine.
    """
    engine_seal = artifact.unseal(engine, "engine")
    artifact.expect_parent(engine, engine_seal, onnx_path, artifact.unseal(onnx_path, "onnx"))
    table = layer_table.load(layer_table.table_path(engine), engine_seal.facts.layer_table_sha256)
    products = onnx_products.products(deployed_graph.load(onnx_path), engine_seal.facts.interface.geometry)
    return audit(products, table)


def report_path(engine: Path) -> Path:
    """Path of the audit report of `engine`."""
    return engine.with_name(engine.name + ".audit.json")


def _audit(product: Product, kernels: list[Layer]) -> ProductAudit:
    named = [layer for layer in kernels if product.name in layer.nodes]
    wanted, find = ("INT8", _quantized) if product.role == "quantized" else ("float", _float)
    got, layer, reason = find(product, named)
    return ProductAudit(name=product.name, op=product.op, flops=product.flops, wanted=wanted, got=got, engine_layer=layer, reason=reason)


def _quantized(product: Product, named: list[Layer]) -> tuple[str, str, str]:
    """Type, kernel and reason for a product that the ONNX quantizes; `named` are the kernels that name it."""
    integer = next(filter(is_integer_product, named), None)
    if integer is not None:
        return "INT8", integer.name, ""
    if not named:
        return "absent", "", product.problem or "no kernel names it; was the node renamed, or folded into a constant?"
    layer = next(filter(is_product, named), named[-1])
    operands = ", ".join(layer.inputs + layer.constants)
    reason = product.problem or f"TensorRT chose kernel {layer.tactic or layer.kind} on {operands}"
    return (layer.outputs or ("float",))[0], layer.name, reason


def _float(product: Product, named: list[Layer]) -> tuple[str, str, str]:
    """The same for a product that is meant to run in float; the type is that of its operands."""
    reason = _FLOAT_REASONS[product.role]
    if not named:
        return "absent", "", reason
    layer = next(filter(is_product, named), named[0])
    return next((kind for kind in layer.inputs + layer.constants if kind in _FLOATS), "float"), layer.name, reason


def _float_layer(row: ProductAudit) -> dict[str, object]:
    reason = f"fell back: {row.reason}" if row.wanted == "INT8" else row.reason
    return {"name": row.name, "op": row.op, "flops": row.flops, "precision": row.got, "reason": reason}


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Audit an engine and write the report; fails if a quantized layer runs in float."""
    parser = argparse.ArgumentParser(prog="python -m engine.audit", description="Report in which precision each layer of an engine runs.")
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--onnx", type=Path, required=True, help="the file the engine was built from")
    parser.add_argument("--out", type=Path, help="report as JSON (default: beside the engine)")
    args = parser.parse_args(argv)
    out = args.out or report_path(args.engine)
    artifact.require_target(out, args.engine, args.onnx, layer_table.table_path(args.engine))
    report = audit_files(args.engine, args.onnx)
    save(out, report)
    require_int8(report)
    _log.info("%s", report.summary)


if __name__ == "__main__":
    main()
