"""Initial weights of a training: which tensors of a file are loaded, which are not, and the report of the command."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_files import key_shapes
from test_train_loop import CPU, SETTINGS, small
from torch import Tensor

from qdbev import artifact
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.detectors.bevformer.official import KEYS
from qdbev.nn.pretrained import load_pretrained
from qdbev.recipes import RECIPES
from qdbev.settings import ConfigError
from train import teacher as float_training
from train.distributed import World

R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)


def norm(name: str, channels: int, counters: bool) -> dict[str, Tensor]:
    tensors = {f"{name}.{leaf}": torch.rand(channels) + 0.5 for leaf in ("weight", "bias", "running_mean", "running_var")}
    return tensors | ({f"{name}.num_batches_tracked": torch.tensor(7)} if counters else {})


def resnet(depths: tuple[int, ...], width: int, counters: bool = True, deformable: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """A ResNet of random tensors under torchvision's names."""
    tensors = {"conv1.weight": torch.randn(width, 3, 7, 7)} | norm("bn1", width, counters)
    channels = width
    for stage, depth in enumerate(depths):
        planes = width * 2**stage
        for block in range(depth):
            name = f"layer{stage + 1}.{block}"
            sizes = {"1": (planes, channels, 1, 1), "2": (planes, planes, 3, 3), "3": (4 * planes, planes, 1, 1)}
            for index, size in sizes.items():
                tensors |= {f"{name}.conv{index}.weight": torch.randn(size)} | norm(f"{name}.bn{index}", size[0], counters)
            if stage in deformable:
                tensors[f"{name}.conv2.conv_offset.weight"] = torch.randn(27, planes, 3, 3)
                tensors[f"{name}.conv2.conv_offset.bias"] = torch.zeros(27)
            if block == 0:
                tensors[f"{name}.downsample.0.weight"] = torch.randn(4 * planes, channels, 1, 1)
                tensors |= norm(f"{name}.downsample.1", 4 * planes, counters)
            channels = 4 * planes
    return tensors


def fcos3d(width: int, embed_dim: int, img: str = "") -> dict[str, Tensor]:
    """An FCOS3D by the names of its file: laterals of stages 2 to 4, five outputs, a head."""
    tensors = {f"{img}backbone.{key}": value for key, value in resnet(R101, width, deformable=(2, 3)).items()}
    for level in range(3):
        tensors[f"{img}neck.lateral_convs.{level}.conv.weight"] = torch.randn(embed_dim, width * 8 * 2**level, 1, 1)
        tensors[f"{img}neck.lateral_convs.{level}.conv.bias"] = torch.randn(embed_dim)
    for level in range(5):
        tensors[f"{img}neck.fpn_convs.{level}.conv.weight"] = torch.randn(embed_dim, embed_dim, 3, 3)
        tensors[f"{img}neck.fpn_convs.{level}.conv.bias"] = torch.randn(embed_dim)
    return tensors | {"bbox_head.conv_cls.weight": torch.randn(10, embed_dim, 3, 3), "bbox_head.conv_cls.bias": torch.randn(10)}


def narrow(recipe: str) -> BEVFormerConfig:
    """The recipe's model with all its blocks and an eighth of its channels."""
    config = RECIPES[recipe]().model
    return dataclasses.replace(
        config,
        backbone=dataclasses.replace(config.backbone, width=8),
        embed_dim=32,
        ffn_dim=16,
        bev_hw=(8, 8),
        rotate_center=(4.0, 4.0),
        encoder_layers=1,
        decoder_layers=1,
        num_query=20,
        max_boxes=20,
    )


def state(model: BEVFormer) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def expect_backbone(model: BEVFormer, file: dict[str, Tensor], prefix: str = "") -> None:
    """Assert that every tensor of the file's backbone is in the model under its name."""
    ours = model.backbone.state_dict()
    for key, value in file.items():
        if key.startswith(prefix) and not key.startswith("fc."):
            name = key.removeprefix(prefix).replace("conv_offset.", "offset.")
            if name not in ours:  # a deformable one
                name, value = name.replace("conv2.weight", "conv2.product.weight"), value.flatten(1)[..., None, None]
            assert torch.equal(ours[name], value), key


@pytest.mark.parametrize(("recipe", "depths", "deformable"), [("tiny", R50, ()), ("base", R101, (2, 3))])
def test_the_backbones_of_these_tests_have_the_official_keys_and_shapes(recipe, depths, deformable):
    keys = key_shapes(recipe)
    official = {key.removeprefix("img_backbone."): shape for key, shape in keys.items() if key.startswith("img_backbone.")}
    with torch.device("meta"):
        assert {key: tuple(value.shape) for key, value in resnet(depths, 64, deformable=deformable).items()} == official


@pytest.mark.parametrize("counters", [True, False])
def test_torchvisions_resnet_50_starts_tiny(counters):
    model = BEVFormer(narrow("tiny"))
    before = state(model)
    file = resnet(R50, 8, counters) | {"fc.weight": torch.randn(1000, 256), "fc.bias": torch.randn(1000)}
    report = load_pretrained(model, file, KEYS)
    expect_backbone(model, file)
    kept = ["backbone: 53 num_batches_tracked keep their initialisation, zero; the file has none"]
    assert report == [
        f"backbone: {len(file) - 2} tensors loaded",
        *([] if counters else kept),
        "neck: keeps its initialisation; the file has no neck",
        "rest of the detector: keeps its initialisation",
        "ignored: fc (2 tensors)",
    ]
    assert all(torch.equal(value, before[key]) for key, value in state(model).items() if not key.startswith("backbone."))


def test_a_plain_caffe_resnet_101_starts_small_as_a_plain_convolution_at_half_weight():
    model = BEVFormer(narrow("small"))
    file = resnet(R101, 8, counters=False) | {"conv1.bias": torch.zeros(8), "layer1.0.downsample.0.bias": torch.zeros(32)}
    report = load_pretrained(model, file, KEYS)
    zero_biases = ("conv1.bias", "layer1.0.downsample.0.bias")
    expect_backbone(model, {key: value for key, value in file.items() if key not in zero_biases})
    assert report == [
        f"backbone: {len(file) - 2} tensors loaded",
        "backbone: 104 num_batches_tracked keep their initialisation, zero; the file has none",
        "backbone: 52 conv_offset tensors keep their initialisation, zero; the file's network is not deformable",
        "neck: keeps its initialisation; the file has no neck",
        "rest of the detector: keeps its initialisation",
        "ignored: 2 biases of convolutions, all zero (conv1.bias)",
    ]
    x = torch.randn(1, 32, 6, 7)
    expected = 0.5 * F.conv2d(x, file["layer3.4.conv2.weight"], padding=1)
    torch.testing.assert_close(model.backbone.layer3[4].conv2(x), expected, atol=1e-4, rtol=0)  # float32 sums of 288 products


@pytest.mark.parametrize("img", ["", "img_"])
def test_a_whole_detector_gives_base_its_backbone_and_neck(img):
    model = BEVFormer(narrow("base"))
    file = fcos3d(8, 32, img)
    report = load_pretrained(model, file, KEYS)
    expect_backbone(model, file, f"{img}backbone.")
    for ours, theirs, levels in (("lateral", "lateral_convs", 3), ("output", "fpn_convs", 4)):
        for level in range(levels):
            for leaf in ("weight", "bias"):
                loaded = model.neck.get_parameter(f"{ours}.{level}.{leaf}")
                assert torch.equal(loaded, file[f"{img}neck.{theirs}.{level}.conv.{leaf}"])
    assert report == [
        f"backbone: {sum('backbone.' in key for key in file)} tensors loaded",
        "neck: 14 tensors loaded",
        "rest of the detector: keeps its initialisation",
        f"ignored: {img}neck (2 tensors)",
        "ignored: bbox_head (2 tensors)",
    ]


def test_a_neck_is_taken_whole_or_not_at_all():
    model = BEVFormer(narrow("small"))
    before = state(model)
    report = load_pretrained(model, fcos3d(8, 32, "img_"), KEYS)
    why = "img_neck.lateral_convs.0.conv.weight is (32, 64, 1, 1) in the file and (32, 256, 1, 1) here"
    assert f"neck: keeps its initialisation; {why}" in report
    assert "ignored: img_neck (16 tensors)" in report
    assert all(torch.equal(value, before[f"neck.{key}"]) for key, value in model.neck.state_dict().items())
    mixed = {key.replace("img_neck.", "neck."): value for key, value in fcos3d(8, 32, "img_").items()}
    report = load_pretrained(BEVFormer(narrow("base")), mixed, KEYS)
    assert "neck: keeps its initialisation; the file has no img_neck.lateral_convs.0.conv.weight" in report


def test_the_published_sizes_of_an_fcos3d_are_those_of_base():
    with torch.device("meta"):
        file = fcos3d(64, 256)
        model = BEVFormer(RECIPES["base"]().model)
        assert "neck: 14 tensors loaded" in load_pretrained(model, file, KEYS)


def test_a_backbone_that_does_not_fit_is_listed_by_the_files_names_and_nothing_is_loaded():
    model = BEVFormer(narrow("small"))
    before = state(model)
    file = fcos3d(8, 32)
    file.pop("backbone.layer3.5.conv2.conv_offset.bias")
    file.pop("backbone.layer4.2.bn3.running_var")
    file["backbone.conv1.bias"] = torch.ones(8)
    file["backbone.layer3.0.conv2.conv_offset.weight"] = torch.zeros(18, 32, 3, 3)
    with pytest.raises(ValueError, match="is not this model's") as error:
        load_pretrained(model, file, KEYS)
    assert str(error.value).splitlines() == [
        "the file's backbone is not this model's: 4 differences: 2 missing, 1 unknown, 1 of another shape",
        "  shape of backbone.layer3.0.conv2.conv_offset.weight: (18, 32, 3, 3), this model has (27, 32, 3, 3)",
        "  missing: backbone.layer3.5.conv2.conv_offset.bias",
        "  missing: backbone.layer4.2.bn3.running_var",
        "  unknown: backbone.conv1.bias",
    ]
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (resnet(R50, 8), "missing: layer3.6.conv1.weight"),
        (fcos3d(8, 32) | {"backbone.layer3.23.conv1.weight": torch.zeros(1)}, "unknown: backbone.layer3.23.conv1.weight"),
        (
            {"conv1.weight": torch.zeros(8, 3, 7, 7)},
            "holds no bottleneck ResNet, neither under img_backbone or backbone nor without",
        ),
    ],
)
def test_another_network_is_refused(file, said):
    with pytest.raises(ValueError, match=said):
        load_pretrained(BEVFormer(narrow("small")), file, KEYS)


def test_an_offset_layer_may_not_be_missing_from_a_plain_models_file():
    with pytest.raises(ValueError, match=r"unknown: layer3\.0\.conv2\.conv_offset\.weight"):
        load_pretrained(BEVFormer(narrow("tiny")), resnet(R50, 8, deformable=(2,)), KEYS)


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A file with a backbone for the small network of the training tests."""
    torch.save(resnet((1, 1, 1), 4) | {"fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth")
    return tmp_path / "resnet.pth"


def test_the_command_starts_from_the_file_says_so_and_the_teacher_remembers_it(tiny_world, tmp_path, pretrained, monkeypatch, capsys):
    real, started = float_training.fit, {}

    def watched(model, *args):
        started.update(state(model))
        return real(model, *args)

    settings = {**SETTINGS, "train.epochs": "1", "data.root": str(tiny_world)}
    argv = ["--recipe", "micro", "--run", str(tmp_path / "run"), "--pretrained", str(pretrained), "--device", "cpu"]
    monkeypatch.setattr(float_training, "fit", watched)
    float_training.main(argv + [part for name, value in settings.items() for part in ("--set", f"{name}={value}")])
    for key, value in torch.load(pretrained).items():
        assert key.startswith("fc.") or torch.equal(started[f"backbone.{key}"], value)
    said = capsys.readouterr().out
    for line in ("backbone: 78 tensors loaded", "neck: keeps its initialisation; the file has no neck", "ignored: fc (1 tensors)"):
        assert f"{pretrained}: {line}\n" in said
    seal, _, _ = artifact.load_checkpoint(tmp_path / "run" / "teacher.pt", "teacher")
    assert seal.facts.pretrained == artifact.sha256(pretrained)


def test_a_resumed_run_goes_on_with_its_own_weights_and_remembers_its_file(tiny_world, tmp_path, pretrained, capsys):
    config, run = small(tiny_world, **{"train.epochs": "1"}), tmp_path / "run"
    first = artifact.load_checkpoint(float_training.train(config, run, CPU, World(), False, pretrained), "teacher")
    capsys.readouterr()
    for again in (None, pretrained):
        seal, weights, _ = artifact.load_checkpoint(float_training.train(config, run, CPU, World(), True, again), "teacher")
        assert seal.facts.pretrained == artifact.sha256(pretrained)
        assert all(torch.equal(value, weights[key]) for key, value in first[1].items())
    told = f"{pretrained}: not loaded again; the run continues with the weights of its last saved state\n"
    assert capsys.readouterr().out == told

    torch.save(resnet((1, 1, 1), 4), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"did not begin from .*other\.pth: leave --pretrained out to continue it, or --resume"):
        float_training.train(config, run, CPU, World(), True, tmp_path / "other.pth")

    fresh = float_training.train(config, run, CPU, World(), False)
    assert artifact.load_checkpoint(fresh, "teacher")[0].facts.pretrained is None
    with pytest.raises(ValueError, match="did not begin from"):
        float_training.train(config, run, CPU, World(), True, pretrained)
    resumed = float_training.train(config, run, CPU, World(), True)
    assert artifact.load_checkpoint(resumed, "teacher")[0].facts.pretrained is None


def test_a_file_that_cannot_start_the_run_leaves_nothing_behind(tiny_world, tmp_path, pretrained):
    torch.save(resnet((1, 1, 2), 4), pretrained)
    with pytest.raises(ValueError, match=r"unknown: layer3\.1\.conv1\.weight"):
        float_training.train(small(tiny_world), tmp_path / "run", CPU, World(), False, pretrained)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["model.backbone.frozen_stages=0", "model.backbone.norm_eval=true"])
def test_a_frozen_backbone_is_not_left_random(tiny_world, tmp_path, setting):
    config = small(tiny_world, **dict([setting.split("=")]))
    with pytest.raises(ConfigError, match="would stay random: give --pretrained"):
        float_training.train(config, tmp_path / "run", CPU, World(), resume=False)
    assert not (tmp_path / "run").exists()
