"""What the benchmarks share: side-by-side timing, and the report."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch


def medians(
    contenders: dict[str, Callable[[], Any]], rounds: int, repeats: int = 1
) -> dict[str, float]:
    """Milliseconds a call, some calls of each in turn after three to warm up."""
    for _ in range(3):
        for call in contenders.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append((time.perf_counter() - start) * 1e3 / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def arguments(description: str, rounds: int) -> argparse.Namespace:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds over all contenders")
    parser.add_argument("--json", help="file to write the figures to")
    return parser.parse_args()


def environment(*packages: str) -> dict[str, Any]:
    """The machine and the versions, printed and returned for the report."""
    report = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "tensordict", *packages)},
    }
    print(report["machine"], report["versions"])
    return report


def write(report: dict[str, Any], path: str | None) -> None:
    """Write the report, if a file is asked for."""
    if path:
        with open(path, "w") as file:
            json.dump(report, file, indent=2)
