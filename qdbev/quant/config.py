"""Settings of quantization: bit widths, ranges, distillation, and the stages of quantization-aware training."""

from dataclasses import dataclass, field
from typing import Literal

from qdbev.settings import require

CalibrationMethod = Literal["max", "mse"]
"""How calibration finds a range: the largest magnitude, or the range with the smallest squared error."""
RangeMode = Literal["fixed", "clip", "step"]
"""How training treats a calibrated range; qdbev/quant/range_mode.py has a class for each."""


@dataclass(frozen=True, kw_only=True)
class Bits:
    """Bit width of a layer's weights and of its input activations."""

    weight: int = 8
    activation: int = 8

    def __post_init__(self) -> None:
        for name, bits in (("weight", self.weight), ("activation", self.activation)):
            require(2 <= bits <= 8, f"{name} bits are {bits}, must be 2 to 8")


@dataclass(frozen=True, kw_only=True)
class GroupBits:
    """Bit widths of one group, which is a top-level child of the network."""

    group: str
    bits: Bits


@dataclass(frozen=True, kw_only=True)
class LayerBits:
    """Bit widths of the layers whose names match a shell glob."""

    layers: str
    bits: Bits


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """View-guided distillation (QD-BEV, arXiv:2308.10515, section 4) and the forms it is compared with; equations in train/distill.py."""

    form: Literal["image", "bev", "product", "guided"] = "product"
    """Which divergence from the teacher is minimised. image: that of each camera's features. bev: that of each BEV cell. product: the
    paper's product of both, summed over cameras and cells. guided: that of the BEV cells, weighted by the image divergence of the cameras
    that see them (docs/distillation.md)."""
    temperature: float = 1.0
    """Temperature of the softmax over channels."""
    weight: float = 0.5
    """Weight of the feature loss, in multiples of the detection loss at the first step: each loss is scaled once, so that it begins at
    its weight times the detection loss."""
    head: float = 0.0
    """Weight of the divergence between the heads' outputs, query by query, in the same unit."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"distill.temperature is {self.temperature}, must be positive")
        require(self.weight >= 0, f"distill.weight is {self.weight}, must be 0 or more")
        require(self.head >= 0, f"distill.head is {self.head}, must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of quantization-aware training: which groups are quantized, for how long, and whether it distills."""

    groups: tuple[str, ...] | None = None
    """Groups that are quantized in this stage; None quantizes all groups of the network."""
    epochs: float = 1.0
    """Length in epochs; fractions are allowed."""
    learning_rate: float = 2e-5
    distill: bool = False
    """Learn from the float teacher as well, as `QuantConfig.distill` says."""

    def __post_init__(self) -> None:
        require(self.epochs > 0, f"stage epochs are {self.epochs}, must be positive")
        require(self.learning_rate > 0, f"stage learning_rate is {self.learning_rate}, must be positive")


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Which layers are quantized to how many bits, and how their ranges are found.

    Layer names are those of `named_modules`; patterns are shell globs. The first of float_layers, layer_bits, edge_layers, group_bits
    and bits that matches a layer decides.
    """

    bits: Bits = field(default_factory=Bits)
    """Bit widths of all layers that nothing below names."""
    group_bits: tuple[GroupBits, ...] = ()
    """Groups with bit widths of their own."""
    edge: Bits = field(default_factory=Bits)
    """Bit widths of `edge_layers`."""
    edge_layers: tuple[str, ...] = ()
    """Layers at the edges of the network that keep more bits: the first convolution and the last linear layers."""
    layer_bits: tuple[LayerBits, ...] = ()
    """Layers with bit widths of their own, as `python -m train.sensitivity` chooses them."""
    float_layers: tuple[str, ...] = ()
    """Layers that stay float, for example because they compute geometry."""
    calibration: CalibrationMethod = "mse"
    """How a range is found: the largest magnitude, or the range with the smallest squared error."""
    calibration_samples: int = 32
    """Number of frames that calibration runs."""
    range_mode: RangeMode = "step"
    """How training treats the calibrated ranges. fixed: activations keep theirs, weights follow their largest value (QD-BEV). clip: the
    end of the range is learned (PACT). step: the step is learned (LSQ)."""
    per_channel: bool = True
    """Weights have one step for each output channel; False gives the whole weight one step."""
    embedding_bits: int | None = None
    """Bit width of the embedding tables, which always have one step for each row; None leaves them float."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    stages: tuple[Stage, ...] = ()
    """Stages of training, one after the other; without any the student is calibrated only."""

    def __post_init__(self) -> None:
        require(self.calibration_samples >= 1, f"quant.calibration_samples is {self.calibration_samples}, must be at least 1")
        require(self.embedding_bits in (None, *range(2, 9)), f"quant.embedding_bits is {self.embedding_bits}, must be 2 to 8 or None")
