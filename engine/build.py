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
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from engine import audit, backend, layer_table, onnx_products, trt_callbacks
from engine.backend import Backend, BackendName, EngineError
from engine.layer_table import Layer
from plugins import tensorrt_ops
from qdbev import artifact, deployed_graph
from qdbev.command import entry_point
from qdbev.facts import BackendVersion, BuildOptions, EngineFacts, Target

_log = logging.getLogger(__name__)
_SHOWN = 5
"""Number of errors of the parser that a message lists."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a build; None leaves the choice to TensorRT."""

    backend: BackendName | None = None
    compute_capabilities: tuple[str, ...] = ()
    """Compute capabilities to build for ahead of time, such as "8.9"; empty builds a portable engine. TensorRT-RTX only."""
    memory_limit_mb: int | None = None
    """Workspace in MB that the engine may use."""
    timing_cache: Path | None = None
    """File of measured kernel times that makes the next build on the same GPU quick, or a folder of such files. TensorRT only."""
    allow_float: bool = False
    """Write the engine even if quantized layers run in float; its seal says so."""


@dataclass(frozen=True)
class Plan:
    """A built engine that is not on disk yet."""

    content: bytes
    table: list[Layer]
    target: Target
    build_seconds: float


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
    plugins = _plugins(chosen)
    deployed_graph.check(onnx_path, model, interface, plugins)
    deployed_graph.require_int8_storage(onnx_path, model)
    products = onnx_products.products(model, interface.geometry)
    plan = build_plan(chosen, onnx_path, options)
    report = audit.audit(products, plan.table)
    if report.offenders and not options.allow_float:
        audit.save(engine_path.with_name(engine_path.name + ".refused.json"), report)
        audit.require_int8(report)
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


def build_plan(chosen: Backend, onnx_path: Path, options: Options) -> Plan:
    """Build an engine from an ONNX. Raises EngineError if an option does not fit the backend, or the parser or builder refuses."""
    trt, failures = chosen.module, _register_plugins(chosen)
    failures.clear()  # the same list for all builds of a process
    messages = trt_callbacks.logger(trt)
    builder = trt.Builder(messages)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, messages, onnx_path)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.memory_limit_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.memory_limit_mb << 20)
    target = _set_target(chosen, config, options)
    cache_path = timing_cache_file(chosen, target, options.timing_cache)
    cache = _open_timing_cache(chosen, config, cache_path)
    started = time.monotonic()
    with trt_callbacks.progress(trt, f"{chosen.name} {chosen.version}") as config.progress_monitor:
        serialized = builder.build_serialized_network(network, config)
    seconds = time.monotonic() - started
    if serialized is None:
        reasons = [*failures, *messages.problems] or ["no reason given"]
        raise EngineError("\n  ".join([f"{chosen.name} {chosen.version} built no engine from {onnx_path}:", *reasons]))
    content = bytes(serialized)
    if cache is not None:
        with artifact.atomic(cache_path) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
    table = layer_table.from_log(messages.layer_table) if messages.layer_table else _inspect(trt, messages, content)
    return Plan(content=content, table=table, target=target, build_seconds=round(seconds, 2))


def plugin_nodes(model: onnx.ModelProto, plugins: deployed_graph.Plugins) -> list[str]:
    """Sorted operators of the graph that run as one of `plugins` and not as a function body."""
    taken = set()
    for node in model.graph.node:
        named = {attribute.name: attribute.s.decode() for attribute in node.attribute if attribute.name.startswith("plugin_")}
        if named and (node.op_type, named.get("plugin_version", "1"), named.get("plugin_namespace", "")) in plugins:
            taken.add(node.op_type)
    return sorted(taken)


def timing_cache_file(chosen: Backend, target: Target, wanted: Path | None) -> Path | None:
    """Path of the timing cache: `wanted` itself, or a file in the folder `wanted` for this version and GPU; None for TensorRT-RTX."""
    if wanted is None or chosen.name != "tensorrt":
        return None
    if not wanted.is_dir():
        return wanted
    words = re.sub(r"[^a-z0-9.]+", "-", f"{chosen.version} {target.gpu}".lower())
    return wanted / f"tensorrt-{words}.timing"


def _parse(trt: Any, network: Any, messages: Any, onnx_path: Path) -> None:
    onnx_parser = trt.OnnxParser(network, messages)
    if onnx_parser.parse_from_file(str(onnx_path)):
        return
    errors = [onnx_parser.get_error(i) for i in range(min(onnx_parser.num_errors, _SHOWN))]
    lines = [f"  node {e.node_name() or '?'} ({e.node_operator() or '?'}): {trt_callbacks.one_line(e.desc())}" for e in errors]
    if any(error.node_operator() == "DeformConv" for error in errors):
        lines.append("  this TensorRT has no DeformConv; export again without --standard-deform-conv")
    raise EngineError("\n".join([f"the parser refuses {onnx_path}:", *lines]))


def _set_target(chosen: Backend, config: Any, options: Options) -> Target:
    """Set the GPUs to build for, and return them for the seal."""
    wanted = options.compute_capabilities
    if chosen.name == "tensorrt":
        device = backend.require_gpu("TensorRT")
        if set(wanted) - {device.compute_capability}:
            raise EngineError(
                f"TensorRT builds for the GPU it runs on ({device.name}, {device.compute_capability}), not for {', '.join(wanted)}; "
                "leave --compute-capability out, or use --backend tensorrt-rtx"
            )
        return Target(compute_capabilities=(device.compute_capability,), gpu=device.name)
    known = chosen.module.ComputeCapability.__members__
    names = {f"{name[2:-1]}.{name[-1]}": value for name, value in known.items() if name.startswith("SM")}
    unknown = [capability for capability in wanted if capability not in names]
    if unknown:
        raise EngineError(f"{chosen.name} {chosen.version} cannot build for {', '.join(unknown)}; it knows {', '.join(names)}")
    if wanted:
        config.num_compute_capabilities = len(wanted)
        for index, capability in enumerate(wanted):
            config.set_compute_capability(names[capability], index)
    return Target(compute_capabilities=wanted or None)


def _open_timing_cache(chosen: Backend, config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(f"{path} is no timing cache of TensorRT {chosen.version} and this GPU; delete it or give another file")
    return cache


def _plugins(chosen: Backend) -> deployed_graph.Plugins:
    """Registered plugins. None for TensorRT-RTX, which aborts the process when it meets a plugin (1.7.1)."""
    if chosen.name != "tensorrt":
        return frozenset()
    _register_plugins(chosen)
    creators = chosen.module.get_plugin_registry().all_creators
    return frozenset((creator.name, creator.plugin_version, creator.plugin_namespace) for creator in creators)


def _register_plugins(chosen: Backend) -> list[str]:
    """Register our plugins with a TensorRT that stores their kernels in the engine; returns what `tensorrt_ops.register` returns."""
    # By this name NVIDIA's module tensorrt.plugin, too, recognises such a version, 10.9 or newer (`_export.py` of 11.4).
    if chosen.name != "tensorrt" or not hasattr(chosen.module, "QuickPluginCreationRequest"):
        return []
    capability = backend.require_gpu("TensorRT").compute_capability
    return tensorrt_ops.register(f"sm_{capability.replace('.', '')}")


def _inspect(trt: Any, messages: Any, content: bytes) -> list[Layer]:
    engine = trt.Runtime(messages).deserialize_cuda_engine(content)
    if engine is None:
        raise EngineError("TensorRT cannot open the engine that it has just built:\n  " + "\n  ".join(messages.problems))
    return layer_table.from_inspector(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.build", description="Build and audit an integer engine from an exported ONNX.")
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="engine file (default: the ONNX's name with .engine)")
    parser.add_argument("--backend", choices=("tensorrt", "tensorrt-rtx"), help="default: TensorRT with a GPU, TensorRT-RTX without")
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
