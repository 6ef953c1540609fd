"""What nvidia-smi tells of a GPU while something runs on it: clocks, power, temperature, memory.

A latency without its clock cannot be compared. Where there is no nvidia-smi (Jetson), nothing is told.
"""

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FIELDS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu", "power.draw", "memory.used")
"""Queried in MHz, degrees Celsius, W and MiB."""
_EVERY_MS = 100
Sample = dict[str, float]


@contextmanager
def watch(bus_id: str) -> Iterator[dict[str, Any]]:
    """Facts about the GPU at PCI address `bus_id`, complete when the block has ended; empty without nvidia-smi."""
    facts: dict[str, Any] = {}
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield facts
        return
    query = [tool, "-i", bus_id, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    before = parse(subprocess.run(query, capture_output=True, text=True, check=False).stdout)
    with tempfile.TemporaryFile("w+") as lines:
        process = subprocess.Popen([*query, f"--loop-ms={_EVERY_MS}"], stdout=lines, stderr=subprocess.DEVNULL)
        try:
            yield facts
        finally:
            process.terminate()
            process.wait()
        lines.seek(0)
        facts.update(summary(before, parse(lines.read())))


def parse(text: str) -> list[Sample]:
    """One sample a line, of the fields that are numbers; a line cut short is left out."""
    samples = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(FIELDS) and all(values):
            samples.append({name: float(value) for name, value in zip(FIELDS, values, strict=True) if value.replace(".", "", 1).isdigit()})
    return samples


def summary(before: list[Sample], during: list[Sample]) -> dict[str, Any]:
    """Median clocks, temperature and power, the lowest SM clock, and by how much the GPU's used memory rose; nothing of no samples."""
    named = {name: values for name in FIELDS if (values := [sample[name] for sample in during if name in sample])}
    facts: dict[str, Any] = {name: statistics.median(values) for name, values in named.items() if name != "memory.used"}
    if "clocks.sm" in named:
        facts["clocks.sm.min"] = min(named["clocks.sm"])
    if "memory.used" in named and before and "memory.used" in before[0]:
        facts["memory_mb"] = max(named["memory.used"]) - before[0]["memory.used"]
    return facts
