"""F: the update alone, of one chain of 10 M parameters: its time, and its memory.

Memory is that of a process of its own, whose allocator hands freed memory back at once.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch
from measuring import MEBIBYTE, Call, medians, peak_memory
from ours import as_it_is
from peers import LOCALIZATION, LR, NBETA
from tensordict import TensorDict
from torch import Tensor, nn

import compat
import funcsgmcmc as fs
from funcsgmcmc import random, tree
from funcsgmcmc.samplers import Evaluation, Sampler, State
from funcsgmcmc.stepping import step_noise

LEAVES, WIDTH = 10, 1024


def leaves(device: torch.device) -> TensorDict:
    """Ten square matrices."""
    return TensorDict(
        {f"{layer}.weight": torch.randn(WIDTH, WIDTH, device=device) for layer in range(LEAVES)}
    )


def contenders(device: torch.device) -> dict[str, Call]:
    """Calls that return what they make."""
    params, grads = leaves(device), leaves(device)
    sampler = fs.sgld(LR, nbeta=NBETA, localization=LOCALIZATION, anchor=params).to(device)
    state, key = sampler.init(params), fs.key(0, device)
    noise = tree.normal_like(key, params)

    def with_noise(sampler: Sampler, state: State, grads: TensorDict, key: Tensor) -> State:
        step_key = random.fold_in(key, state.step)
        flat = step_noise(step_key, tree.size(state.params), torch.float32)
        return sampler.update(state, Evaluation(grads), tree.unflatten(flat, state.params))[0]

    def given_noise(sampler: Sampler, state: State, grads: TensorDict, noise: TensorDict) -> State:
        return sampler.update(state, Evaluation(grads), noise)[0]

    found: dict[str, Call] = {"copy": params.clone}
    for how, wrap in (("eager", as_it_is), ("compiled", fs.compiled)):
        given, drawn = wrap(given_noise), wrap(with_noise)
        found[f"update, {how}"] = lambda given=given: given(sampler, state, grads, noise)
        found[f"update and noise, {how}"] = lambda drawn=drawn: drawn(sampler, state, grads, key)
    return found | {"compat": optimizer(compat, device)} | published(device)


def optimizer(package: Any, device: torch.device) -> Call:
    """The step of an optimizer, noise included."""
    params = [nn.Parameter(leaf) for leaf in leaves(device).values()]
    for param in params:
        param.grad = torch.randn_like(param)
    return package.SGMCMC.sgld(params, lr=LR, nbeta=NBETA, localization=LOCALIZATION).step


def published(device: torch.device) -> dict[str, Call]:
    """Devinterp 2.0.1."""
    import devinterp.optim

    return {"published": optimizer(devinterp.optim, device)}


def measure(device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds and MiB by contender."""
    calls = contenders(device)
    report = {
        "parameters, MiB": LEAVES * WIDTH**2 * 4 / MEBIBYTE,
        "largest leaf, MiB": WIDTH**2 * 4 / MEBIBYTE,
        "milliseconds": medians(calls, rounds, device=device),
        "peak, MiB": {name: alone(name, device) for name in calls},
    }
    for name in calls:
        milliseconds, peak = report["milliseconds"][name], report["peak, MiB"][name]
        print(f"  {name:26} {milliseconds:8.2f} ms {peak:8.1f} MiB", flush=True)
    return report


def alone(name: str, device: torch.device) -> float:
    """Peak memory of a contender in a process of its own."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    command = [sys.executable, __file__, name, str(device)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender")
    parser.add_argument("device", type=torch.device)
    options = parser.parse_args()
    call = contenders(options.device)[options.contender]
    print(json.dumps(peak_memory(call, options.device)))
