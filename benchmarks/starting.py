"""What a program waits for before its first step: imports and compilation, in fresh processes.

Cold: torch's compiler has never run on the machine. Its own share of that, which any program pays
once (it tries the instruction sets and precompiles its headers), is the time of a trivial function.
Warm: another process has compiled the same.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

WARM_RUNS = 3


def measure() -> dict[str, Any]:
    """Seconds by program."""
    report: dict[str, Any] = {
        f"import {name}": statistics.median(seconds(f"import {name}") for _ in range(WARM_RUNS))
        for name in ("torch", "funcsgmcmc")
    }
    for name in ("trivial function", "noise", "step", "step with metrics"):
        with tempfile.TemporaryDirectory() as cache:
            cold = seconds(name, cache)
            warm = statistics.median(seconds(name, cache) for _ in range(WARM_RUNS))
        report[name] = {"cold": cold, "warm": warm}
    for name, value in report.items():
        print(f"  {name:26} {value}", flush=True)
    return report


def seconds(program: str, cache: str | None = None) -> float:
    """Run a program in a process of its own."""
    environment = dict(os.environ)
    if cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = cache
    command = [sys.executable, __file__, program]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def program(name: str) -> float:
    """Seconds that a program takes: an import, or the first call of a compiled function."""
    if name.startswith("import "):
        start = time.perf_counter()
        exec(name, {})
        return time.perf_counter() - start
    import torch
    from networks import WORKLOADS
    from ours import Ours

    import funcsgmcmc as fs

    if name == "trivial function":
        trivial = torch.compile(torch.sin)
        call = lambda: trivial(torch.ones(100))  # noqa: E731
    elif name == "noise":
        call = Ours(WORKLOADS["A"]).compiled_noise()
    else:
        call = Ours(WORKLOADS["A"]).vmapped(fs.compiled, metrics=name == "step with metrics")
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(program(sys.argv[1])))
