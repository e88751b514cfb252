"""A run that streams all its draws to disk, beside the same run without draws: memory and time.

200 chains of a network of 4,999 parameters, each in a process of its own.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import Figure, processor

NUM_CHAINS, NUM_DRAWS, ROUNDS = 200, 1000, 3


def measure() -> dict[str, Any]:
    """Peak MiB and seconds of both, medians of alternating rounds, and bytes on disk."""
    found: dict[str, list[dict[str, float]]] = {"without draws": [], "with draws on disk": []}
    for _ in range(ROUNDS):
        for name in found:
            answer = subprocess.run(
                [sys.executable, __file__, name], capture_output=True, text=True, check=True
            )
            found[name].append(json.loads(answer.stdout.splitlines()[-1]))
    report: dict[str, Any] = {
        name: {
            "peak, MiB": statistics.median(each["peak, MiB"] for each in rounds),
            "seconds": Figure.of([each["seconds"] for each in rounds]),
            "MiB on disk": statistics.median(each["MiB on disk"] for each in rounds),
        }
        for name, rounds in found.items()
    }
    for name, value in report.items():
        print(f"  {name:20} {value}", flush=True)
    return {"device": processor(), **report}


def program(name: str) -> dict[str, float]:
    """One run."""
    import torch
    from measuring import _status
    from torch import nn

    import funcsgmcmc as fs

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 68), nn.Tanh(), nn.Linear(68, 8), nn.Linear(8, 3))
    data = torch.randn(1000, 64), torch.randint(3, (1000,))
    keeps = name == "with draws on disk"
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "run.zarr"
        start = time.perf_counter()
        fs.sample(
            fs.module_loss(model, nn.functional.cross_entropy),
            fs.params_of(model),
            data,
            fs.sgld(1e-4, nbeta=100.0, localization=10.0),
            num_chains=NUM_CHAINS,
            num_draws=NUM_DRAWS,
            batch_size=32,
            key=fs.key(0),
            record=["draws"] if keeps else [],
            **({"store": store} if keeps else {}),
        )
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    return {"peak, MiB": _status("VmHWM"), "seconds": seconds, "MiB on disk": size / 2**20}


if __name__ == "__main__":
    print(json.dumps(program(sys.argv[1])))
