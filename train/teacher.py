"""Trains a float teacher on nuScenes: `python -m train.teacher --recipe micro --run runs/demo`.

The published models start from pretrained networks: `tiny` from torchvision's ResNet-50, `small` and `base` from an FCOS3D
(qdbev/nn/pretrained.py): `python -m train.teacher --recipe tiny --run runs/tiny --pretrained resnet50-0676ba61.pth`.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from qdbev import artifact, detectors
from qdbev.command import add_device, add_settings, entry_point, parse_device
from qdbev.config import Config, override, to_dict
from qdbev.detector import BACKBONE, Detector
from qdbev.facts import TeacherFacts
from qdbev.frames import open_frames
from qdbev.nn.pretrained import load_pretrained
from qdbev.nn.state_dict import read_state_dict
from qdbev.recipes import RECIPES
from qdbev.settings import ConfigError
from train.cpu_kernels import use_cpu_kernels
from train.distributed import World, process_group, sync_batch_norm
from train.loop import Run, fit
from train.stage_loss import StageLoss


def train(config: Config, folder: Path, device: torch.device, world: World, resume: bool, pretrained: Path | None = None) -> Path:
    """Train the float model of `config`, starting from the backbone in `pretrained`, and return the path of its checkpoint.

    The checkpoint `teacher.pt`, the log and the state from which `resume` continues are in `folder`.
    """
    torch.manual_seed(config.seed)
    frames = open_frames(config, config.data.train_split, training=True)
    model = detectors.build(config.model)
    origin = folder / "float.pretrained.json"
    facts = origin_facts(origin, pretrained, world) if resume else initialise(model, origin, pretrained, world)
    if world.size > 1:
        sync_batch_norm(model)
    run = Run(
        config=config,
        schedule=config.train,
        folder=folder,
        name="float",
        device=device,
        world=world,
        loss=StageLoss(None, config, world),
        resume=resume,
    )
    facts = TeacherFacts(image_hw=frames.transform.padded_hw, **facts, **fit(model, frames, run)._asdict())
    teacher = folder / "teacher.pt"
    if world.is_main:
        artifact.save_checkpoint(teacher, config=to_dict(config), weights=model.cpu().state_dict(), parent=None, facts=facts)
    return teacher


def initialise(model: Detector, origin: Path, pretrained: Path | None, world: World) -> dict[str, str]:
    """Load the backbone of `pretrained` into `model`, print what was loaded, and note the file's hash in `origin`.

    Returns:
        Facts for the teacher's seal: the hash of `pretrained`, or nothing without such a file.

    Raises:
        ConfigError: There is no file, but frozen parameters of the backbone would keep their random values.
        ValueError: The file is no checkpoint or its backbone is not the model's.
    """
    if pretrained is None:
        if not all(parameter.requires_grad for parameter in model.get_submodule(BACKBONE).parameters()):
            raise ConfigError(
                "this recipe freezes the backbone's first stages or its batch norms, which would stay random: give --pretrained with an "
                "ImageNet or detector checkpoint, or set model.backbone.frozen_stages=-1 and model.backbone.norm_eval=false"
            )
        if world.is_main:
            origin.unlink(missing_ok=True)
        return {}
    report = load_pretrained(model, read_state_dict(pretrained), detectors.official_keys(model.config))
    facts = {"pretrained": artifact.sha256(pretrained)}
    if world.is_main:
        sys.stdout.write("".join(f"{pretrained}: {line}\n" for line in report))
        with artifact.atomic(origin) as temporary:
            temporary.write_text(json.dumps(facts))
    return facts


def origin_facts(origin: Path, pretrained: Path | None, world: World) -> dict[str, str]:
    """Return the facts that `initialise` noted in `origin` when the resumed run began; `pretrained` is only compared with them.

    Raises:
        ConfigError: The run began from another file, or without one.
    """
    facts = json.loads(origin.read_text()) if origin.is_file() else {}
    if pretrained is not None:
        if artifact.sha256(pretrained) != facts.get("pretrained"):
            raise ConfigError(
                f"the run in {origin.parent} did not begin from {pretrained}: leave --pretrained out to continue it, "
                "or --resume to begin anew"
            )
        if world.is_main:
            sys.stdout.write(f"{pretrained}: not loaded again; the run continues with the weights of its last saved state\n")
    return facts


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Train the float teacher."""
    parser = argparse.ArgumentParser(prog="python -m train.teacher", description=main.__doc__)
    parser.add_argument("--recipe", required=True, help=", ".join(RECIPES))
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--pretrained", type=Path, help=".pth whose backbone the training starts from")
    parser.add_argument("--resume", action="store_true", help="continue from the run's last saved state")
    add_settings(parser)
    add_device(parser)
    args = parser.parse_args(argv)
    if args.recipe not in RECIPES:
        raise ConfigError(f"--recipe {args.recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
    config = override(RECIPES[args.recipe](), args.settings)
    device = parse_device(args.device)
    use_cpu_kernels(device)
    artifact.require_target(args.run / "teacher.pt", args.pretrained)
    with process_group(device) as world:
        train(config, args.run, device, world, args.resume, args.pretrained)


if __name__ == "__main__":
    main()
