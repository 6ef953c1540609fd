"""What a run is: one frozen dataclass per room, joined in `Config`.

A config is built by a function in recipes.py, changed on the command line only through `override`, and travels inside every
artifact through `to_dict` and `from_dict`. After training no stage takes a recipe.
"""

import ast
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting that does not exist or has the wrong type or value."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and how pixels reach the network."""

    root: str
    """Folder in nuScenes format (tables in `root/version`)."""
    version: str = "v1.0-trainval"
    train_split: str = "train"
    val_split: str = "val"
    image_scale: float = 0.5
    """Scale of the camera images; the result is padded at the bottom and right to `pad_multiple`."""
    pad_multiple: int = 32
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    """Per channel, in the channel order the network sees (see `to_rgb`), on the 0-255 scale."""
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    to_rgb: bool = True
    queue_length: int = 3
    """Frames of a training queue, the current one included."""
    full_quaternion: bool = False
    """can_bus[3:7] is the ego's rotation (w, x, y, z). The code that trained the published checkpoints casts the quaternion to a float on
    assignment and so repeats w four times (upstream pull request 285); False does the same."""
    photometric: bool = True
    """Random brightness, contrast, saturation, hue and channel order during training."""
    workers: int = 4
    """Loader processes; 0 loads in the training process."""

    def __post_init__(self) -> None:
        _require(0 < self.image_scale <= 1, f"data.image_scale is {self.image_scale}, must be in (0, 1]")
        _require(self.queue_length >= 1, f"data.queue_length is {self.queue_length}, must be at least 1")
        _require(len(self.mean) == 3 and len(self.std) == 3, "data.mean and data.std need three values each")
        _require(all(s > 0 for s in self.std), f"data.std is {self.std}, must be positive")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A bottleneck ResNet; the standard ones are depths (3, 4, 6, 3) and (3, 4, 23, 3) at width 64."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    """Planes of the first stage; stage k has width * 2**k planes and four times as many outputs."""
    style: Literal["pytorch", "caffe"] = "pytorch"
    """Where the stride of a bottleneck sits: on the 3x3 convolution (pytorch) or on the first 1x1 (caffe)."""
    deformable_stages: tuple[int, ...] = ()
    """Stages (from 0) whose 3x3 convolutions are modulated deformable ones (DCNv2)."""
    out_stages: tuple[int, ...] = (3,)
    frozen_stages: int = 1
    """Number of stages kept fixed together with the stem; -1 trains everything."""
    norm_eval: bool = True
    """Batch norm uses its stored statistics during training, and its affine is fixed."""

    def __post_init__(self) -> None:
        _require(bool(self.out_stages), "model.backbone.out_stages is empty")
        _require(max(self.out_stages) < len(self.depths), f"model.backbone.out_stages {self.out_stages} exceed depths {self.depths}")
        _require(self.frozen_stages >= -1, f"model.backbone.frozen_stages is {self.frozen_stages}, must be -1 or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """BEVFormer. Defaults are those of the published tiny model."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    num_levels: int = 1
    """Feature levels the neck gives; more than `out_stages` adds stride-2 convolutions on the last."""
    embed_dim: int = 256
    num_heads: int = 8
    ffn_dim: int = 512
    num_cameras: int = 6
    bev_hw: tuple[int, int] = (50, 50)
    """Rows (y, forward) and columns (x, right) of the BEV grid."""
    pc_range: tuple[float, ...] = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
    """x, y, z minimum then maximum, metres, lidar frame."""
    post_center_range: tuple[float, ...] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
    """Decoded boxes with a centre outside are dropped."""
    num_pillar_points: int = 4
    """Heights at which a BEV cell is projected into the cameras."""
    num_spatial_points: int = 8
    """Sampling points per head and level in spatial cross-attention, shared out among the pillar points."""
    num_points: int = 4
    """Sampling points per head in temporal self-attention and in the decoder."""
    encoder_layers: int = 3
    decoder_layers: int = 6
    num_query: int = 900
    num_classes: int = 10
    max_boxes: int = 300
    dropout: float = 0.1
    rotate_center: tuple[float, float] = (100.0, 100.0)
    """Centre (x, y) in BEV cells about which the previous BEV is rotated. The published models of every size were trained with the
    constant (100, 100), which is the grid centre only for base."""
    shifted_reference: bool = True
    """Shift the current frame's temporal reference points too. A slip of the code that trained the published v1.0 checkpoints
    (fixed upstream in 2f37d0d, 2023-07-27); False is the corrected form."""
    absolute_yaw: bool = True
    """The network reads the vehicle's heading on the map (can_bus[16]) and a turn that jumps by 360 degrees where the heading wraps ([17]),
    as the published models were trained. False lets it read the wrapped turn alone, in radians and degrees, so that it cannot learn the
    map's compass. The geometry is right either way."""

    def __post_init__(self) -> None:
        _require(self.embed_dim % self.num_heads == 0, f"model.embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        _require(
            self.num_spatial_points % self.num_pillar_points == 0,
            f"model.num_spatial_points {self.num_spatial_points} is not a multiple of num_pillar_points {self.num_pillar_points}",
        )
        _require(self.num_levels >= len(self.backbone.out_stages), "model.num_levels is smaller than the number of backbone outputs")
        _require(len(self.pc_range) == 6 and len(self.post_center_range) == 6, "model.pc_range and post_center_range need six values")
        _require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}, must be in [0, 1)")

    def level_hw(self, image_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Sizes of the neck's outputs for padded images: those of the backbone's stages, then halves."""
        strides = [4 * 2 ** (self.backbone.out_stages[0] + level) for level in range(self.num_levels)]
        return [(-(-image_hw[0] // stride), -(-image_hw[1] // stride)) for stride in strides]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Losses, optimizer and schedule; defaults are the official ones."""

    epochs: float = 24
    """Fractions are allowed."""
    batch_size: int = 1
    """Samples per step over all processes."""
    learning_rate: float = 2e-4
    backbone_lr_factor: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 35.0
    warmup_steps: int = 500
    warmup_start: float = 1 / 3
    """Fraction of the learning rate at the first step; rises linearly."""
    final_lr_fraction: float = 1e-3
    anneal: Literal["epoch", "step"] = "epoch"
    """How often the cosine moves: once an epoch, as upstream, or every step, which short runs need."""
    cls_weight: float = 2.0
    box_weight: float = 0.25
    code_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)
    grid_mask: float = 0.7
    """Probability that a step masks a grid of squares in the current images; 0 switches it off."""
    amp: bool = True
    """Mixed precision (float16) where there is a GPU; geometry and quantizers stay in float32."""

    def __post_init__(self) -> None:
        _require(self.epochs > 0, f"train.epochs is {self.epochs}, must be positive")
        _require(self.batch_size >= 1, f"train.batch_size is {self.batch_size}, must be at least 1")
        _require(self.learning_rate > 0, f"train.learning_rate is {self.learning_rate}, must be positive")
        _require(0 <= self.grid_mask <= 1, f"train.grid_mask is {self.grid_mask}, must be a probability")


@dataclass(frozen=True, kw_only=True)
class Bits:
    """Width of a layer's weights and of its input activations."""

    weight: int = 8
    activation: int = 8

    def __post_init__(self) -> None:
        for name, bits in (("weight", self.weight), ("activation", self.activation)):
            _require(2 <= bits <= 8, f"{name} bits are {bits}, must be 2 to 8")


@dataclass(frozen=True, kw_only=True)
class LayerBits:
    """Width of the layers whose names match a shell glob."""

    layers: str
    bits: Bits


GROUPS = ("backbone", "neck", "encoder", "decoder", "head")
"""Top-level children of the model, each with its bits in QuantConfig; also the order of the progressive stages."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """View-guided distillation (QD-BEV, arXiv:2308.10515, section 4) and what it is compared with; train/distill.py has the equations."""

    form: Literal["image", "bev", "sum", "product", "guided"] = "product"
    """What is minimised: the image divergence of each camera, the BEV divergence of each cell, their sum, the paper's product summed over
    cameras and cells, or the BEV divergence weighted by a camera map that says only where to learn (docs/distillation.md)."""
    temperature: float = 1.0
    axis: Literal["channel", "space"] = "channel"
    """Of the softmax: over the channels at each place, which gives every place a divergence of its own, or over each channel's places."""
    generalized: bool = True
    """Generalised divergence p log(p / q) - p + q, smallest at q = p under any weighting of its terms; False is the plain p log(p / q)."""
    image_map: Literal["camera", "pixel"] = "camera"
    """What a camera lays on the cells it sees: its one divergence, or the divergence at the places where the cell's pillar appears."""
    foreground: float = 0.0
    """Share of the cells' weight that goes to where the teacher sees objects; the rest is spread evenly."""
    weight: float = 0.5
    """Of what `form` says, in units that `balance` says."""
    head: float = 0.0
    """Of the divergence between the heads' outputs, query by query, in the same units."""
    balance: Literal["none", "start", "follow"] = "start"
    """none: the weights multiply the losses as they are. start: each loss is scaled once, so that it begins at its weight times the
    detection loss. follow: it is scaled at every step."""

    def __post_init__(self) -> None:
        _require(self.temperature > 0, f"distill.temperature is {self.temperature}, must be positive")
        _require(0 <= self.foreground <= 1, f"distill.foreground is {self.foreground}, must be in [0, 1]")
        _require(self.weight >= 0, f"distill.weight is {self.weight}, must be 0 or more")
        _require(self.head >= 0, f"distill.head is {self.head}, must be 0 or more")
        signed = self.axis == "space" and not self.generalized
        _require(
            not (self.image_map == "pixel" and signed),
            "distill.image_map is 'pixel', but the plain divergence of a place is negative at times under distill.axis 'space'; "
            "set distill.generalized=true or distill.axis=channel",
        )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of quantization-aware training: which groups are quantized, how long, and what is learned from."""

    groups: tuple[str, ...] = GROUPS
    epochs: float = 1.0
    """Fractions are allowed."""
    learning_rate: float = 2e-5
    distill: bool = False
    """Learn from the float teacher too, as `QuantConfig.distill` says."""

    def __post_init__(self) -> None:
        unknown = [group for group in self.groups if group not in GROUPS]
        _require(not unknown, f"stage groups {unknown} do not exist; there are {', '.join(GROUPS)}")
        _require(self.epochs > 0, f"stage epochs are {self.epochs}, must be positive")
        _require(self.learning_rate > 0, f"stage learning_rate is {self.learning_rate}, must be positive")


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Which layers are quantized to how many bits, and how their ranges are found.

    The five groups are the model's top-level children. Layer names are those of `named_modules`; patterns are shell globs, and the
    first of float_layers, layer_bits, edge_layers, group that matches decides.
    """

    backbone: Bits = field(default_factory=Bits)
    neck: Bits = field(default_factory=Bits)
    encoder: Bits = field(default_factory=Bits)
    decoder: Bits = field(default_factory=Bits)
    head: Bits = field(default_factory=Bits)
    edge: Bits = field(default_factory=Bits)
    edge_layers: tuple[str, ...] = ("backbone.conv1", "head.cls_branches.*.6", "head.reg_branches.*.4")
    """First convolution and last linears, which stay at `edge` bits."""
    layer_bits: tuple[LayerBits, ...] = ()
    """Layers with a width of their own, as `python -m train.sensitivity` chooses them."""
    float_layers: tuple[str, ...] = ("encoder.can_bus_mlp.*", "decoder.reference_points")
    """Geometry: eighteen numbers of mixed units, and a constant."""
    calibration: Literal["max", "percentile", "mse", "entropy"] = "mse"
    calibration_samples: int = 32
    scale: Literal["fixed", "clip", "step"] = "step"
    """What becomes of the calibrated ranges in training. fixed: activations keep theirs, weights follow their largest value (QD-BEV).
    clip: the end of the range is learned from what lies outside it (PACT). step: the step is learned (LSQ)."""
    per_channel: bool = True
    """Weights have a step for each output channel; False gives them one."""
    embedding_bits: int | None = None
    """Width of the embedding tables, weight only, always a step for each row; None leaves them float."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    stages: tuple[Stage, ...] = ()
    """Trained one after the other; none is calibration alone."""

    def __post_init__(self) -> None:
        _require(self.calibration_samples >= 1, f"quant.calibration_samples is {self.calibration_samples}, must be at least 1")
        _require(self.embedding_bits in (None, *range(2, 9)), f"quant.embedding_bits is {self.embedding_bits}, must be 2 to 8 or None")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run's numbers."""

    name: str
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    seed: int = 0


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values; `from_dict` is the inverse."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """Config from `to_dict` output.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type.
    """
    return _build(Config, values, "")


def override(config: Config, settings: list[str]) -> Config:
    """Config with `a.b=value` settings applied, typed as the field is.

    Raises:
        ConfigError: A setting has no '=', names no field, or its value does not fit the field.
    """
    values = to_dict(config)
    for setting in settings:
        path, separator, text = setting.partition("=")
        _require(bool(separator), f"--set {setting!r}: expected name=value, for example train.epochs=2")
        *parents, leaf = path.strip().split(".")
        node: Any = values
        for depth, name in enumerate([*parents, leaf]):
            known = isinstance(node, dict) and name in node
            where = ".".join(parents[:depth]) or "the config"
            choices = ", ".join(sorted(node)) if isinstance(node, dict) else "nothing"
            _require(known, f"--set {setting!r}: {where} has no {name!r}; it has {choices}")
            if depth < len(parents):
                node = node[name]
        _require(not isinstance(node[leaf], dict), f"--set {setting!r}: {path} is a group; name one of its settings")
        node[leaf] = _parse(text.strip())
    return from_dict(values)


def _parse(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _build(kind: type, values: Any, path: str) -> Any:
    _require(isinstance(values, dict), f"{path or 'config'} must be a mapping, got {values!r}")
    hints = get_type_hints(kind)
    for key in values:
        _require(key in hints, f"{path}{key} is no setting; known: {', '.join(hints)}")
    built = {key: _coerce(value, hints[key], f"{path}{key}") for key, value in values.items()}
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in built and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    _require(not missing, f"{path or 'config'} lacks {', '.join(missing)}")
    return kind(**built)


def _coerce(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotated type; only int to float and list to tuple are converted."""
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{path}.")
    if origin is Literal:
        _require(value in get_args(hint), f"{path} is {value!r}, must be one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _coerce(value, next(a for a in get_args(hint) if a is not type(None)), path)
    if origin is tuple:
        _require(isinstance(value, list | tuple), f"{path} is {value!r}, must be a list")
        args = get_args(hint)
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        _require(len(kinds) == len(value), f"{path} is {value!r}, must have {len(kinds)} values")
        return tuple(_coerce(v, k, f"{path}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = type(value) is hint
    _require(fits, f"{path} is {value!r} ({type(value).__name__}), must be {getattr(hint, '__name__', hint)}")
    return value
