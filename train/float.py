"""nuScenes in, float teacher out: `python -m train.float --recipe micro --run runs/demo`."""

import argparse
from pathlib import Path

import torch

from qdbev import artifact
from qdbev.command import add_device, add_settings, device, entry_point
from qdbev.config import Config, ConfigError, override, to_dict
from qdbev.data.dataset import FrameDataset
from qdbev.model.bevformer import BEVFormer
from qdbev.recipes import RECIPES
from train.criterion import detection_loss
from train.distributed import World, sync_batch_norm, world
from train.loop import Run, fit


def train(config: Config, folder: Path, device: torch.device, world: World, resume: bool) -> Path:
    """Train the float model of `config`; the teacher checkpoint's path."""
    torch.manual_seed(config.seed)
    frames = FrameDataset(config.data, config.model.pc_range, config.data.train_split, training=True, seed=config.seed)
    model = BEVFormer(config.model)
    if world.size > 1:
        sync_batch_norm(model)
    run = Run(
        config=config,
        schedule=config.train,
        folder=folder,
        name="float",
        device=device,
        world=world,
        loss=lambda output, batch: detection_loss(output, batch.boxes, batch.labels, config.train, world.mean),
        resume=resume,
    )
    facts = {"image_hw": list(frames.padded_hw), **fit(model, frames, run)}
    teacher = folder / "teacher.pt"
    if world.is_main:
        artifact.save_checkpoint(
            teacher, kind="teacher", config=to_dict(config), weights=model.cpu().state_dict(), parent=None, facts=facts
        )
    return teacher


@entry_point
def main() -> None:
    """Train the float teacher."""
    parser = argparse.ArgumentParser(prog="python -m train.float", description=main.__doc__)
    parser.add_argument("--recipe", required=True, help=", ".join(RECIPES))
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--resume", action="store_true", help="continue from the run's last saved state")
    add_settings(parser)
    add_device(parser)
    args = parser.parse_args()
    if args.recipe not in RECIPES:
        raise ConfigError(f"--recipe {args.recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
    config = override(RECIPES[args.recipe](), args.settings)
    target = device(args.device)
    with world(target) as processes:
        train(config, args.run, target, processes, args.resume)


if __name__ == "__main__":
    main()
