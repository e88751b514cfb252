"""One step against the number of chains, on network A."""

from typing import Any

import torch
from chains import of_one_step
from measuring import medians
from networks import WORKLOADS
from ours import Ours, as_it_is
from peers import bare_loop, peers

import funcsgmcmc as fs

CHAINS = (1, 4, 16, 64, 256, 1024)


def measure(device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step by number of chains and contender."""
    report = {}
    for chains in CHAINS:
        workload = WORKLOADS["A"].on(device).with_chains(chains)
        ours = Ours(workload)
        contenders = {
            "bare loop": bare_loop(workload),
            "eager": ours.vmapped(as_it_is),
            "compiled": ours.vmapped(fs.compiled),
            "compiled, blocks": ours.blocks(),
            "loop, compiled": ours.looped(fs.compiled),
        } | peers(workload)
        # As many rounds as take about as long as for 64 chains.
        few = max(5, min(rounds, rounds * 64 // chains))
        report[str(chains)] = of_one_step(medians(contenders, few, device=device))
        print(chains, {name: round(ms, 2) for name, ms in report[str(chains)].items()}, flush=True)
    return report
