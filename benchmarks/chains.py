"""One step of many chains, on five networks: this library, its peers, and a bare loop.

Same networks, batch (shared by the chains), settings and dtype (float32). Peers that take no
localization have it in their log-posterior, as their documentation does with priors.
"""

from typing import Any

import torch
from measuring import Call, Figures, medians
from networks import WORKLOADS, Workload
from ours import STEPS_PER_BLOCK, Ours, as_it_is
from peers import STEPS_PER_SCAN, bare_loop, peers

import funcsgmcmc as fs


def contenders(workload: Workload) -> dict[str, Call]:
    """Everything that is measured on a workload."""
    ours = Ours(workload)
    parts = {
        f"{name}, {how}": call
        for how, wrap in (("eager", as_it_is), ("compiled", fs.compiled))
        for name, call in ours.parts(wrap).items()
    }
    buffer = torch.empty_like(ours.parts(as_it_is)["noise"]())
    return (
        {"bare loop": bare_loop(workload)}
        | ours.steps()
        | parts
        | {"noise, normal_": lambda: buffer.normal_()}
        | peers(workload)
    )


def measure(workloads: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step by workload and contender, and the way that "auto" takes."""
    report = {}
    for name in workloads:
        workload = WORKLOADS[name].on(device)
        figures = of_one_step(medians(contenders(workload), rounds, device=device))
        report[name] = {
            "title": workload.title,
            "milliseconds": figures,
            "auto": Ours(workload).chosen(),
        }
        print(f"\n{workload.title}")
        for contender, milliseconds in figures.items():
            ratio = milliseconds / figures["bare loop"]
            print(f"  {contender:26} {milliseconds:8.2f} ms {ratio:6.2f} bare", flush=True)
    return report


def of_one_step(figures: Figures) -> Figures:
    """Figures of one step, also of calls that make many."""
    many = {"blackjax, scan": STEPS_PER_SCAN, "compiled, blocks": STEPS_PER_BLOCK}
    return {name: figure.over(many.get(name, 1)) for name, figure in figures.items()}
