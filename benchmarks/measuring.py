"""What the benchmarks share: side-by-side timing, peak memory, and what ran where."""

import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
MEBIBYTE = 2**20
SPREAD = 5
PACKAGES = ("torch", "tensordict", "posteriors", "blackjax", "jax", "devinterp")


class Figure(float):
    """A median that knows its noise.

    Attributes:
        spread: Medians of up to five consecutive parts of what it is the median of.
    """

    spread: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """The median of values in the order in which they were measured; two at least."""
        figure = cls(statistics.median(values))
        ends = [len(values) * part // SPREAD for part in range(SPREAD + 1)]
        figure.spread = tuple(
            statistics.median(values[start:end]) for start, end in pairwise(ends) if start < end
        )
        return figure

    def over(self, number: int) -> "Figure":
        """The same of one of so many steps."""
        figure = type(self)(self / number)
        figure.spread = tuple(each / number for each in self.spread)
        return figure


Figures = dict[str, Figure]


def spread_of(report: Any, path: str = "") -> dict[str, list[float]]:
    """The spread of all figures in a part of a report, by their path: keys with `/` between."""
    if isinstance(report, Figure):
        return {path: list(report.spread)}
    if not isinstance(report, dict):
        return {}
    return {
        name: spread
        for key, value in report.items()
        for name, spread in spread_of(value, f"{path}/{key}" if path else str(key)).items()
    }


def wait(device: torch.device) -> None:
    """Wait for a device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(
    contenders: dict[str, Call],
    rounds: int,
    *,
    repeats: int = 3,
    device: torch.device | None = None,
) -> Figures:
    """Milliseconds a call: a few calls of each contender in turn, after one that is not timed.

    In turn, so that a noisy machine disturbs all alike; the call that is not timed brings back to
    the caches what the contender before has taken out, as in a loop of steps.
    """
    device = device or torch.device("cpu")
    for _ in range(2):
        for call in contenders.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            call()
            wait(device)
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            wait(device)
            times[name].append((time.perf_counter() - start) * 1e3 / repeats)
    return {name: Figure.of(values) for name, values in times.items()}


def peak_memory(call: Call, device: torch.device) -> float:
    """MiB that a call needs at its peak, beyond what is there before it (its results included).

    On the CPU, of pages in memory: meant for a process whose allocator hands freed memory back at
    once (`MALLOC_MMAP_THRESHOLD_`), and for Linux.
    """
    for _ in range(2):
        call()
    gc.collect()
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MEBIBYTE
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return int(line.split()[1]) / 1024


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def processor() -> str:
    """The name of the processor."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
