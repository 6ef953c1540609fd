"""Scores a model on a split with the official nuScenes metric.

    python -m eval.run --model runs/demo/teacher.pt

Writes results_nusc.json (the official submission, which other nuScenes tools read) and metrics.json, each with a seal, into --out.
"""

import logging

from rich.console import Console

from eval.evaluate import METRICS, evaluate, table, warnings
from eval.open_model import open_model
from eval.options import chosen_data, model_parser
from qdbev import artifact
from qdbev.command import entry_point

_log = logging.getLogger(__name__)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Evaluate one model."""
    files, out = (
        ".pt, .onnx or .engine file with its seal",
        "folder for the results (default: eval/<name>_<suffix> beside the model, such as eval/w4a6_onnx)",
    )
    parser = model_parser("eval.run", "Score a model on nuScenes with the official metric.", files, out)
    args = parser.parse_args(argv)
    out = args.out or args.model.parent / "eval" / args.model.name.replace(".", "_")
    artifact.require_folder(out)
    with open_model(args.model, args.device) as model:
        config, split = chosen_data(model.config, args)
        content = evaluate(args.model, model, config, split, out)
    Console().print(table(content))
    for warning in warnings(content):
        _log.warning("warning: %s", warning)
    model_ms, frame_ms = (1e3 * content["seconds"][name] for name in ("model", "frame"))
    _log.info("%.1f ms per frame in the model, %.1f ms per frame in all; %s", model_ms, frame_ms, out / METRICS)


if __name__ == "__main__":
    main()
