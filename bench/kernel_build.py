"""Compile the kernels of every recipe without a GPU and report what they use: `python -m bench.kernel_build --report FILE`.

The report lists registers, shared memory, stack and spills of each attention kernel for each GPU architecture.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import report
from plugins import nvrtc
from plugins.attention.variant import TYPES, Variant
from qdbev import artifact
from qdbev.command import entry_point
from qdbev.config import Config
from qdbev.data.image_transform import image_transform
from qdbev.ops.contract import MSDA, SCA
from qdbev.recipes import RECIPES

ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
"""GPU architectures of the report, from compute capability 8.0 to 12.0."""
_log = logging.getLogger(__name__)


def variants(config: Config) -> Iterator[Variant]:
    """Yield the kernels of both attentions of a recipe's network, for all combinations of number types, float32 first.

    The images have the size of nuScenes images or, for the recipe `micro`, of the synthetic world of that name.
    """
    model, levels = config.model, camera_levels(config)
    cameras = {"operator": SCA, "num_points": model.num_spatial_points, "num_pillar_points": model.num_pillar_points, "level_hw": levels}
    bev = {"operator": MSDA, "num_points": model.num_points, "num_pillar_points": 1, "level_hw": (model.bev_hw,)}
    for value, out in TYPES:
        for sizes in (cameras, bev):
            yield Variant(value=value, out=out, num_heads=model.num_heads, channels=model.embed_dim // model.num_heads, **sizes)


def camera_levels(config: Config) -> tuple[tuple[int, int], ...]:
    """Return height and width of each level of the recipe's image features, in cells."""
    return tuple(config.model.level_hw(image_transform(config.data, config.data.stored_hw).padded_hw))


def measure(recipes: Sequence[str], architectures: Sequence[str]) -> dict[str, Any]:
    """Compile every kernel of these recipes for every architecture and return the figures of the report.

    Raises:
        CompileError: NVRTC is not installed or does not know an architecture.
    """
    rows = []
    for recipe in recipes:
        for variant in variants(RECIPES[recipe]()):
            constants = {name: value for name, value in vars(variant).items() if name != "operator"}
            kernel = {"recipe": recipe, "op": variant.operator.torch_name, **constants}
            for architecture in architectures:
                code, usage = nvrtc.build(variant.source(), architecture)
                rows.append({**kernel, "architecture": architecture, **usage, "cubin_bytes": len(code)})
            _log.info("%s %s %s to %s", recipe, variant.entry, variant.value, variant.out)
    spilled = sum(row["spill_store_bytes"] + row["spill_load_bytes"] for row in rows)
    version = ".".join(map(str, nvrtc.version()))
    return {"threads": Variant.threads, "nvrtc": version, "spill_bytes": spilled, "rows": rows}


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Compile the kernels of the recipes for every architecture and report what they use."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_build", description=main.__doc__)
    parser.add_argument("--report", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES))
    args = parser.parse_args(argv)
    artifact.require_target(args.report)
    figures = measure(args.recipes, args.architectures)
    report.write(args.report, figures)
    sys.stdout.write(f"{len(figures['rows'])} kernels, {figures['spill_bytes']} bytes spilled; {args.report}\n")


if __name__ == "__main__":
    main()
