"""Writes the report of a measurement."""

import json
from pathlib import Path
from typing import Any

from qdbev import artifact


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures as a JSON file, with the time, commit and versions with which they were made; None writes nothing."""
    if path is not None:
        with artifact.atomic(path) as temporary:
            temporary.write_text(json.dumps({**figures, "made": artifact.provenance()}, indent=1) + "\n")
