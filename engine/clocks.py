"""Records clocks, power, temperature and memory of a GPU with nvidia-smi while something runs on it.

Latencies can only be compared together with the clocks at which they were measured. Without nvidia-smi (Jetson) nothing is recorded.
"""

import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FIELDS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu", "power.draw", "memory.used")
"""Queried fields: clocks in MHz, temperature in degrees Celsius, power in W, memory in MiB."""
_EVERY_MS = 100
"""Milliseconds between two samples."""
_LIMIT_S = 10.0
"""Seconds that one query of nvidia-smi, or its end, may take; it can hang when the driver does."""


@contextmanager
def watch(bus_id: str) -> Iterator[dict[str, Any]]:
    """Record the GPU at PCI address `bus_id` during the `with` block, and fill the yielded facts in when it ends; see `summary`.

    They stay empty if nvidia-smi is missing or does not respond.
    """
    facts: dict[str, Any] = {}
    query = ["nvidia-smi", "-i", bus_id, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        before = parse(subprocess.run(query, capture_output=True, text=True, check=False, timeout=_LIMIT_S).stdout)
    except (OSError, subprocess.TimeoutExpired):
        yield facts
        return
    with tempfile.TemporaryFile("w+") as lines:
        process = subprocess.Popen([*query, f"--loop-ms={_EVERY_MS}"], stdout=lines, stderr=subprocess.DEVNULL)
        try:
            yield facts
        finally:
            _end(process)
        lines.seek(0)
        facts.update(summary(before, parse(lines.read())))


def parse(text: str) -> list[dict[str, float]]:
    """Read one sample, values by field, from each line; fields that are not numbers and incomplete lines are left out."""
    samples = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(FIELDS) and all(values):
            samples.append({name: float(value) for name, value in zip(FIELDS, values, strict=True) if value.replace(".", "", 1).isdigit()})
    return samples


def summary(before: list[dict[str, float]], during: list[dict[str, float]]) -> dict[str, Any]:
    """Median clocks, temperature and power, lowest SM clock, and the rise of the used memory in MiB; empty if there are no samples."""
    named = {name: values for name in FIELDS if (values := [sample[name] for sample in during if name in sample])}
    facts: dict[str, Any] = {name: statistics.median(values) for name, values in named.items() if name != "memory.used"}
    if "clocks.sm" in named:
        facts["clocks.sm.min"] = min(named["clocks.sm"])
    if "memory.used" in named and before and "memory.used" in before[0]:
        facts["memory_mb"] = max(named["memory.used"]) - before[0]["memory.used"]
    return facts


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_LIMIT_S)
