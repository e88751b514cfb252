"""Run the benchmarks, and write their figures, tables and plots for the documentation.

make bench          # docs/benchmarks/cpu.{json,md}, cpu-*.png
make bench-gpu      # docs/benchmarks/cuda.{json,md}, cuda-*.png
python benchmarks/run.py --parts chains --workloads A --rounds 10 --output /tmp
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chains
import keeping
import large
import optimizers
import report
import starting
import sweep
import torch
import update
from measuring import environment
from networks import WORKLOADS

DOCUMENTATION = Path(__file__).parents[1] / "docs" / "benchmarks"
ON_GPU = {"parts": "chains,sweep,update", "workloads": "ACE"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--parts", help="comma-separated (default: all; on a GPU, three)")
    parser.add_argument("--workloads", help="letters (default: all; on a GPU, ACE)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds over all contenders")
    parser.add_argument("--output", type=Path, default=DOCUMENTATION, help="folder to write to")
    options = parser.parse_args()
    device, rounds = options.device, options.rounds
    gpu = device.type == "cuda"
    workloads = options.workloads or (ON_GPU["workloads"] if gpu else "".join(WORKLOADS))
    measures: dict[str, Callable[[], Any]] = {
        "chains": lambda: chains.measure(workloads, device, rounds),
        "sweep": lambda: sweep.measure(device, rounds),
        "update": lambda: update.measure(device, rounds),
        "large": large.measure,
        "keeping": keeping.measure,
        "optimizers": lambda: optimizers.measure(rounds),
        "starting": starting.measure,
    }
    chosen = (options.parts or (ON_GPU["parts"] if gpu else ",".join(measures))).split(",")
    unknown = set(chosen) - set(measures)
    if unknown:
        parser.error(f"--parts must be of {', '.join(measures)}, got {', '.join(unknown)}")
    options.output.mkdir(parents=True, exist_ok=True)
    figures = options.output / f"{device.type}.json"
    found = environment(device)
    print(found)
    if options.parts and figures.exists():
        # Parts that are measured anew replace those of an earlier run on the same machine.
        before = json.loads(figures.read_text())
        found = before if found.items() <= before.items() else found
    for part in chosen:
        print(f"\n{part}", flush=True)
        found[part] = measures[part]()
        # Nothing measured is lost if a later part fails.
        figures.write_text(json.dumps(found, indent=2) + "\n")
    report.write(found, options.output, device.type)
    print(f"\n{report.summary(found)}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="devinterp|compat")
    main()
