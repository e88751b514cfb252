"""What a program waits for before its first step: imports and compilation, in fresh processes.

Cold: torch's compiler has never run on the machine. Its own share of that, which any program pays
once (it tries the instruction sets and precompiles its headers), is the time of a trivial function.
Warm: another process has compiled the same. From a file: another machine has, and `load_compiled`
(which counts) has filled the cache. An import is timed beyond those that it makes itself.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

ROUNDS, IMPORTS_A_ROUND = 3, 5
# What is timed, and what has been imported before it.
IMPORTS = {
    "import torch": ("import torch", ""),
    "import tensordict beyond torch": ("import tensordict", "import torch"),
    "import funcsgmcmc beyond tensordict": ("import funcsgmcmc", "import torch, tensordict"),
    # What is imported where it is first used: by a run of SGLD and its estimate, and in all.
    "funcsgmcmc, for a run": (
        "import funcsgmcmc as fs\nfs.module_loss, fs.params_of, fs.sgld, fs.sample, fs.llc",
        "import torch, tensordict",
    ),
    "funcsgmcmc, everything": ("from funcsgmcmc import *", "import torch, tensordict"),
}
COMPILED = ("trivial function", "noise", "step", "step with metrics")


def measure() -> dict[str, Any]:
    """Seconds by program, which take turns."""
    from measuring import Figure  # imports torch, which the programs below time

    imports: dict[str, list[float]] = {name: [] for name in IMPORTS}
    first: dict[str, dict[str, list[float]]] = {
        name: {"cold": [], "warm": [], "from a file": []} for name in COMPILED
    }
    for _ in range(ROUNDS):
        for _ in range(IMPORTS_A_ROUND):
            for name, times in imports.items():
                times.append(seconds(name))
        for name, times in first.items():
            with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as elsewhere:
                file = f"{here}/steps.compiled"
                times["cold"].append(seconds(name, here, "save", file))
                times["warm"].append(seconds(name, here))
                times["from a file"].append(seconds(name, elsewhere, "load", file))
    report = {name: Figure.of(times) for name, times in imports.items()} | {
        name: {how: Figure.of(times) for how, times in both.items()} for name, both in first.items()
    }
    for name, value in report.items():
        print(f"  {name:26} {value}", flush=True)
    return report


def seconds(program: str, cache: str | None = None, *file: str) -> float:
    """Run a program in a process of its own, which saves or loads a file of what is compiled."""
    environment = dict(os.environ)
    if cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = cache
    command = [sys.executable, __file__, program, *file]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def program(name: str, action: str | None = None, file: str = "") -> float:
    """Seconds that a program takes: an import, or the first call of a compiled function."""
    if name in IMPORTS:
        timed, before = IMPORTS[name]
        exec(before, {})
        start = time.perf_counter()
        exec(timed, {})
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
    if action == "load":
        fs.artifacts.load_compiled(file)
    call()
    took = time.perf_counter() - start
    if action == "save":
        fs.artifacts.save_compiled(file)
    return took


if __name__ == "__main__":
    print(json.dumps(program(*sys.argv[1:])))
