"""Settings of quantization: bit widths, ranges, distillation, and the stages of quantization-aware training."""

from dataclasses import dataclass, field
from typing import Literal

from qdbev.settings import require

CalibrationMethod = Literal["max", "mse"]
"""Method by which calibration finds a range: the largest magnitude, or the range with the smallest squared error."""
RangeMode = Literal["fixed", "clip", "step"]
"""Treatment of calibrated ranges in training; qdbev/quant/range_mode.py has a class for each."""


@dataclass(frozen=True, kw_only=True)
class Bits:
    """Bit widths of the weights of a layer and of its input activations, 2 to 8 each."""

    weight: int = 8
    activation: int = 8

    def __post_init__(self) -> None:
        for name, bits in (("weight", self.weight), ("activation", self.activation)):
            require(2 <= bits <= 8, f"{name} bits are {bits}, must be 2 to 8")


@dataclass(frozen=True, kw_only=True)
class GroupBits:
    """Bit widths of one group, which is a top-level child of the network."""

    group: str
    """Name of the child."""
    bits: Bits


@dataclass(frozen=True, kw_only=True)
class LayerBits:
    """Bit widths of the layers whose names match a pattern."""

    layers: str
    """Shell glob for names as `named_modules` gives them."""
    bits: Bits


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """View-guided distillation (QD-BEV, arXiv:2308.10515, section 4) and the forms it is compared with, as in docs/distillation.md."""

    form: Literal["image", "bev", "product", "guided"] = "product"
    """Divergence between teacher and student that training minimises. image: of the features of each camera. bev: of the features of each
    BEV cell. product: the paper's product of both, summed over cameras and cells. guided: of the BEV cells, each weighted by the image
    divergence of the cameras that see it."""
    temperature: float = 1.0
    """Temperature of the softmax over channels."""
    weight: float = 0.5
    """Weight of the feature-distillation loss: at the first step the loss is scaled, once, to this weight times the detection loss."""
    head: float = 0.0
    """Weight of the divergence between the outputs of the two heads, query by query, in the same unit as `weight`."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"distill.temperature is {self.temperature}, must be positive")
        require(self.weight >= 0, f"distill.weight is {self.weight}, must be 0 or more")
        require(self.head >= 0, f"distill.head is {self.head}, must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of quantization-aware training: which groups are quantized, how long it lasts, and whether it distills."""

    groups: tuple[str, ...] | None = None
    """Groups that are quantized in this stage; None quantizes all groups of the network."""
    epochs: float = 1.0
    """Length in epochs; fractions are allowed."""
    learning_rate: float = 2e-5
    """Largest learning rate of the stage."""
    distill: bool = False
    """True adds the distillation losses of `QuantConfig.distill` to the detection loss."""

    def __post_init__(self) -> None:
        require(self.epochs > 0, f"stage epochs are {self.epochs}, must be positive")
        require(self.learning_rate > 0, f"stage learning_rate is {self.learning_rate}, must be positive")


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Which layers are quantized to how many bits, and how their ranges are found.

    Layers are named as by `named_modules`; patterns are shell globs. The first of float_layers, layer_bits, edge_layers and group_bits
    that matches a layer decides; `bits` applies to all other layers.
    """

    bits: Bits = field(default_factory=Bits)
    """Bit widths of all layers that no other setting names."""
    group_bits: tuple[GroupBits, ...] = ()
    """Bit widths of whole groups."""
    edge: Bits = field(default_factory=Bits)
    """Bit widths of `edge_layers`."""
    edge_layers: tuple[str, ...] = ()
    """Patterns of the layers at the edges of the network that keep more bits, usually the first convolution and the last linear layers."""
    layer_bits: tuple[LayerBits, ...] = ()
    """Bit widths of single layers; `python -m train.sensitivity` chooses such widths."""
    float_layers: tuple[str, ...] = ()
    """Patterns of the layers that stay float, for example because they compute geometry."""
    calibration: CalibrationMethod = "mse"
    """Method by which calibration finds ranges."""
    calibration_samples: int = 32
    """Number of frames that calibration runs."""
    range_mode: RangeMode = "step"
    """How training treats the calibrated ranges. fixed: an activation keeps its range, the range of a weight moves with its largest value
    (QD-BEV). clip: the end of the range is learned (PACT). step: the step is learned (LSQ)."""
    per_channel: bool = True
    """True gives each output channel of a weight a step of its own; False gives the whole weight one step."""
    embedding_bits: int | None = None
    """Bit width of embedding tables that no pattern names; None leaves them float. Tables always have one step for each row."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Distillation losses of the stages with `distill`."""
    stages: tuple[Stage, ...] = ()
    """Stages of quantization-aware training in their order; without stages the student is only calibrated."""

    def __post_init__(self) -> None:
        require(self.calibration_samples >= 1, f"quant.calibration_samples is {self.calibration_samples}, must be at least 1")
        require(self.embedding_bits in (None, *range(2, 9)), f"quant.embedding_bits is {self.embedding_bits}, must be 2 to 8 or None")
