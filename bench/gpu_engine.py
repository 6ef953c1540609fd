"""Compares an engine on this GPU with its ONNX in onnxruntime on noise: `python -m bench.gpu_engine --engine F --onnx F --out FILE`.

It needs no dataset. With a dataset, eval.engine_eval compares scores too.
"""

import argparse
from pathlib import Path

from bench import gpu_network
from eval.comparison import TensorDifference, compare
from eval.open_model import open_model
from qdbev import artifact
from qdbev.command import entry_point


def differences(engine: Path, onnx: Path) -> list[TensorDifference]:
    """Compare the outputs of an engine and its ONNX on two successive frames of noise.

    Raises:
        ArtifactError: A file is missing or damaged, or the engine was made from another one.
        EngineError: The engine cannot be opened here, or the GPU reports a failure.
    """
    with open_model(onnx) as source, open_model(engine) as built:
        artifact.expect_parent(engine, built.seal, onnx, source.seal)
        height, width = built.seal.facts.interface.inputs["images"][-2:]
        frames = gpu_network.noise(source.config, (height, width))
        return list(compare([(onnx.name, source), (engine.name, built)], frames))


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Compare an engine with its ONNX; fails if an output is out of tolerance."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_engine", description=main.__doc__)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--onnx", type=Path, required=True, help="ONNX that it was built from")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    args = parser.parse_args(argv)
    gpu_network.save(differences(args.engine, args.onnx), args.out)


if __name__ == "__main__":
    main()
