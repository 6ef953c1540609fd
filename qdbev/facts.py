"""Facts in seals, measured or decided when an artifact was made. A fact that older or differently made files lack is None."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from qdbev.schema import Interface

ImageSize = tuple[int, int]
"""Height and width of the padded images in pixels."""


@dataclass(frozen=True, kw_only=True)
class InfosFacts:
    """The info cache of a dataset, with numbers of samples and boxes; `splits` has the samples of each split."""

    kind: ClassVar[str] = "infos"
    tables: dict[str, tuple[int, ...]]
    """Size in bytes and modification time in nanoseconds of each table, and the number of CAN bus files under `can_bus`."""
    samples: int
    scenes: int
    boxes: int
    boxes_with_points: int
    samples_without_can_signals: int
    splits: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """The state of a training that can be resumed."""

    kind: ClassVar[str] = "training"
    step: int


@dataclass(frozen=True, kw_only=True)
class _ModelFacts:
    """Facts of every model; steps and epochs are those of all stages so far."""

    image_hw: ImageSize | None = None
    steps: int | None = None
    epochs: float | None = None
    final_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherFacts(_ModelFacts):
    """A float model."""

    kind: ClassVar[str] = "teacher"
    seconds: float | None = None
    """Duration of the training."""
    pretrained: str | None = None
    """sha256 of the file with the backbone that training started from."""
    official: str | None = None
    """sha256 of the published checkpoint that was converted."""
    untrained: bool = False
    """The weights are random."""


@dataclass(frozen=True, kw_only=True)
class StudentFacts(_ModelFacts):
    """A quantized model. `epochs` and `stage` are those of a student that was kept during training."""

    kind: ClassVar[str] = "student"
    stage: int | None = None
    """Stage, counted from 1."""
    paper_bytes: float | None = None
    """Size as QD-BEV counts it: every parameter at the width of the weights."""
    packed_bytes: int | None = None
    """Size of the packed file."""


@dataclass(frozen=True, kw_only=True)
class PackedFacts:
    """A packed student. Multiply-accumulates (`macs`) and bit operations (`bops`) are those of one frame."""

    kind: ClassVar[str] = "packed"
    image_hw: ImageSize
    parts: dict[str, int]
    """Bytes of each part before compression."""
    float_bytes: float
    paper_bytes: float
    macs: int
    bops: int
    float_bops: int


@dataclass(frozen=True, kw_only=True)
class OnnxFacts:
    """An ONNX file of the deployed graph."""

    kind: ClassVar[str] = "onnx"
    interface: Interface
    bytes: int
    opset: int | None = None
    nodes: int | None = None
    float16: bool = False
    passes: dict[str, int] = field(default_factory=dict)
    """Number of places that each graph pass changed."""
    trace_s: float | None = None
    peak_memory_mb: int | None = None
    int4_bytes: int | None = None
    """Size of the storage file with 4-bit weights, where there is one."""
    parity: dict[str, float] = field(default_factory=dict)
    """Largest difference (max_abs) and smallest cosine of each output against PyTorch."""

    @property
    def image_hw(self) -> ImageSize:
        height, width = self.interface.inputs["images"][-2:]
        return height, width


@dataclass(frozen=True, kw_only=True)
class BackendVersion:
    """The library that built an engine."""

    name: Literal["tensorrt", "tensorrt-rtx", "cpu"]
    """`cpu` is OpenVINO."""
    version: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """The GPUs or the CPU that an engine was built for."""

    compute_capabilities: tuple[str, ...] | None
    """None where TensorRT-RTX built for every GPU that it supports, and for a CPU."""
    gpu: str | None = None
    """Name of the only model of GPU that the engine fits."""
    cpu: str | None = None
    """Name of the only model of CPU that the engine fits."""
    instruction_set: str | None = None
    """The widest instruction set of that CPU for integer products, such as avx512_vnni."""
    cpu_kernels: str | None = None
    """Version of the CPU kernels that compute the custom operators; None where their function bodies do."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How an engine was built, so that it can be built again."""

    onnx: str
    """Path of the ONNX file, relative to the engine's folder."""
    memory_limit_mb: int | None = None
    allow_float: bool = False


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """A TensorRT or TensorRT-RTX engine."""

    kind: ClassVar[str] = "engine"
    interface: Interface
    backend: BackendVersion
    target: Target
    build: BuildOptions | None = None
    build_seconds: float | None = None
    plugins: tuple[str, ...] = ()
    """Operators of the graph that run as registered plugins."""
    plan_bytes: int
    audit: dict[str, Any] = field(default_factory=dict)
    """Counts of engine/audit.py."""
    layer_table_sha256: str


@dataclass(frozen=True, kw_only=True)
class PredictionsFacts:
    """Detections of a split in nuScenes' submission format."""

    kind: ClassVar[str] = "predictions"
    split: str


@dataclass(frozen=True, kw_only=True)
class MetricsFacts:
    """Official metrics of a model."""

    kind: ClassVar[str] = "metrics"
    nds: float
    map: float


Facts = InfosFacts | TrainingFacts | TeacherFacts | StudentFacts | PackedFacts | OnnxFacts | EngineFacts | PredictionsFacts | MetricsFacts
Kind = Literal["infos", "training", "teacher", "student", "packed", "onnx", "engine", "predictions", "metrics"]
