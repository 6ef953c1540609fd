"""Builds an integer engine from an exported ONNX, and audits it.

    python -m engine.build --onnx runs/demo/w8a8.onnx --compute-capability 8.6 8.9 12.0

With a GPU the builder is TensorRT, and the engine is for that GPU. Without one it is TensorRT-RTX, which builds ahead of time for the named
GPUs, or a portable engine. Networks are strongly typed: the ONNX alone decides the type of each tensor. The custom operators are plugins
from TensorRT 10.9 on, elsewhere their ONNX function bodies (plugins/README.md). The engine is audited before it is written, and refused if
a quantized layer runs in float. Its layer table, its audit and its seal are written beside it.
"""

import argparse
import logging
import os
from pathlib import Path
from typing import get_args

import onnx

from engine import audit, backend, build_cpu, build_tensorrt, layer_table, onnx_products
from engine.backend import BackendName
from engine.plan import Options
from qdbev import artifact, deployed_graph
from qdbev.command import entry_point
from qdbev.facts import BackendVersion, BuildOptions, EngineFacts

_log = logging.getLogger(__name__)


def build_file(onnx_path: Path, engine_path: Path, options: Options) -> audit.Report:
    """Build, audit, write and seal an engine from a sealed ONNX, and return its audit.

    If a quantized layer lost INT8, only the audit is written, as `<engine>.refused.json`.

    Raises:
        ArtifactError: The ONNX is missing, changed since it was sealed, or no ONNX artifact.
        DeployedGraphError: The ONNX is no deployed graph, or cannot be built.
        EngineError: An option does not fit, TensorRT refuses, or a quantized layer lost INT8.
    """
    parent = artifact.unseal(onnx_path, "onnx")
    model = deployed_graph.load(onnx_path)
    interface = parent.facts.interface
    chosen = backend.select(options.backend)
    plugins = build_tensorrt.plugins(chosen)
    deployed_graph.check(onnx_path, model, interface, plugins)
    deployed_graph.require_int8_storage(onnx_path, model)
    products = onnx_products.products(model, interface.geometry)
    if chosen.name == "cpu":
        plan = build_cpu.build_plan(chosen, onnx_path, model, options)
    else:
        plan = build_tensorrt.build_plan(chosen, onnx_path, options)
    report = audit.audit(products, plan.table)
    if report.offenders and not options.allow_float:
        audit.save(engine_path.with_name(engine_path.name + ".refused.json"), report)
        audit.require_int8(report)
    if chosen.name == "cpu":
        build_cpu.require_same_numbers(chosen, plan, onnx_path)
    audit.save(audit.report_path(engine_path), report)
    table_path = layer_table.table_path(engine_path)
    layer_table.save(table_path, plan.table)
    with artifact.atomic(engine_path) as temporary:
        temporary.write_bytes(plan.content)
    facts = EngineFacts(
        interface=interface,
        backend=BackendVersion(name=chosen.name, version=chosen.version),
        target=plan.target,
        build=BuildOptions(
            onnx=os.path.relpath(onnx_path, engine_path.parent), memory_limit_mb=options.memory_limit_mb, allow_float=options.allow_float
        ),
        build_seconds=plan.build_seconds,
        plugins=tuple(plugin_nodes(model, plugins)),
        plan_bytes=len(plan.content),
        audit=report.facts(),
        layer_table_sha256=artifact.sha256(table_path),
    )
    artifact.seal(engine_path, config=parent.config, parent=parent, facts=facts)
    return report


def plugin_nodes(model: onnx.ModelProto, plugins: deployed_graph.Plugins) -> list[str]:
    """Sorted operators of the graph that run as one of `plugins` and not as a function body."""
    taken = set()
    for node in model.graph.node:
        named = {attribute.name: attribute.s.decode() for attribute in node.attribute if attribute.name.startswith("plugin_")}
        if named and (node.op_type, named.get("plugin_version", "1"), named.get("plugin_namespace", "")) in plugins:
            taken.add(node.op_type)
    return sorted(taken)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.build", description="Build and audit an integer engine from an exported ONNX.")
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="engine file (default: the ONNX's name with .engine)")
    parser.add_argument("--backend", choices=get_args(BackendName), help="default: TensorRT with a GPU, TensorRT-RTX without")
    parser.add_argument(
        "--compute-capability", nargs="+", default=(), metavar="X.Y", help="TensorRT-RTX: GPUs to build for (default: portable)"
    )
    parser.add_argument("--memory-limit", type=_positive, metavar="MB", help="workspace the engine may use")
    parser.add_argument("--timing-cache", type=Path, help="file or folder of kernel timings (TensorRT; default: the engine's folder)")
    parser.add_argument("--allow-float", action="store_true", help="write the engine even if quantized layers run in float")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number of MB")
    return int(text)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Build an engine from an ONNX."""
    args = parse_args(argv)
    engine_path = args.out or args.onnx.with_suffix(".engine")
    artifact.require_target(engine_path, args.onnx)
    options = Options(
        backend=args.backend,
        compute_capabilities=tuple(args.compute_capability),
        memory_limit_mb=args.memory_limit,
        timing_cache=args.timing_cache or engine_path.parent,
        allow_float=args.allow_float,
    )
    report = build_file(args.onnx, engine_path, options)
    _log.info("%s: %s", engine_path, report.summary)


if __name__ == "__main__":
    main()
