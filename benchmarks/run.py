"""Run the benchmarks, and write their figures, tables and plots for the documentation.

make bench          # docs/benchmarks/cpu.{json,md}, cpu-*.png
make bench-gpu      # docs/benchmarks/cuda.{json,md}, cuda-*.png
python benchmarks/run.py --parts chains --workloads A --rounds 10 --output /tmp

At the end it says what is slower than in the run whose figures it replaces, and then exits with 1.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chains
import comparing
import keeping
import large
import optimizers
import report
import starting
import sweep
import torch
import update
from measuring import environment, spread_of
from networks import WORKLOADS

DOCUMENTATION = Path(__file__).parents[1] / "docs" / "benchmarks"
ON_GPU = {"parts": "chains,sweep,update", "workloads": "ACE"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--parts", help="comma-separated (default: all; on a GPU, three)")
    parser.add_argument("--workloads", help="letters (default: all; on a GPU, ACE)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds over all contenders")
    parser.add_argument("--output", type=Path, default=DOCUMENTATION, help="folder to write to")
    parser.add_argument("--against", type=Path, help="figures (default: those in the folder)")
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
    earlier = json.loads(figures.read_text()) if figures.exists() else {}
    before = json.loads(options.against.read_text()) if options.against else earlier
    found: dict[str, Any] = environment(device)
    print(found)
    if options.parts and found.items() <= earlier.items():
        # Parts that are measured anew replace those of an earlier run on the same machine.
        found = dict(earlier)
    found["spread"] = dict(found.get("spread", {}))
    for part in chosen:
        print(f"\n{part}", flush=True)
        found[part] = measures[part]()
        found["spread"][part] = spread_of(found[part])
        # Nothing measured is lost if a later part fails.
        figures.write_text(json.dumps(found, indent=2) + "\n")
    report.write(found, options.output, device.type)
    print(f"\n{report.summary(found)}")
    if not before:
        return 0
    print(f"\n{comparing.text(before, found, chosen)}")
    changes = comparing.compare(before, found, chosen)
    return int(any(change.is_ours and change.verdict == "slower" for change in changes))


if __name__ == "__main__":
    warnings.filterwarnings(
        "ignore", category=DeprecationWarning, module=r"devinterp|funcsgmcmc\.compat"
    )
    sys.exit(main())
