"""Builds engines with TensorRT and TensorRT-RTX.

Networks are strongly typed: the ONNX alone decides the type of each tensor. The custom operators are plugins from TensorRT 10.9 on,
elsewhere their ONNX function bodies (plugins/README.md).
"""

import re
import time
from pathlib import Path
from typing import Any

from engine import backend, layer_table, trt_callbacks
from engine.backend import Backend, EngineError
from engine.layer_table import Layer
from engine.plan import Options, Plan
from plugins import tensorrt_ops
from qdbev import artifact, deployed_graph
from qdbev.facts import Target

_SHOWN = 5
"""Number of errors of the parser that a message lists."""


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


def plugins(chosen: Backend) -> deployed_graph.Plugins:
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
