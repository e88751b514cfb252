"""The same problems through the optimizer of devinterp 2.0.1, in the loop that it documents.

One chain after the other: forward, backward, `optimizer.step()`. The network is `nn.Sequential` of
`nn.Linear` without bias, on the identity as its inputs, which is all data of covariance 1. Burn-in,
chains and steps are ours, so that both take the same number of gradients.
"""

import copy
import math
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from known import Network, Problem
from torch import Tensor, nn

# ε times nβ L + γ, the largest curvature: the literature's step sizes lie there. The best is taken,
# with the truth known: better than a user could choose.
LRS = (0.05, 0.2, 0.8)
NUM_PILOTS = 4  # chains, at each of these


def module_of(network: Network, anchor: Tensor) -> nn.Sequential:
    """The network as a module, at the anchor."""
    layers = [nn.Linear(before, after, bias=False) for before, after in pairwise(network.widths)]
    with torch.no_grad():
        for layer, weight in zip(layers, network.layers(anchor), strict=True):
            layer.weight.copy_(weight)
    return nn.Sequential(*layers)


def chain(module: nn.Sequential, problem: Problem, lr: float, seed: int) -> float:
    """nβ times the mean loss of one chain, after burn-in."""
    from devinterp.optim import SGMCMC

    torch.manual_seed(seed)
    settings = problem.settings
    model, inputs = copy.deepcopy(module), torch.eye(module[0].in_features)
    targets = module(inputs).detach()
    optimizer = SGMCMC.sgld(
        model.parameters(),
        lr=lr,
        nbeta=settings.nbeta,
        localization=settings.localization,
    )
    total = 0.0
    for step in range(settings.num_steps):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().sum() / 2
        loss.backward()
        optimizer.step()
        if step >= settings.num_burnin_steps:
            total += loss.item()
    return settings.nbeta * total / (settings.num_steps - settings.num_burnin_steps)


def published_estimate(problem: Problem, seed: int) -> dict[str, Any]:
    """λ̂ at the step size that was best in a pilot, and its error from the spread of chains."""
    widths, rank = problem.shape
    settings, module = problem.settings, module_of(Network(widths, rank), problem.anchor)
    largest = settings.nbeta * (len(widths) - 1) + settings.localization
    pilots = {}
    for factor in LRS:
        means = [chain(module, problem, factor / largest, index) for index in range(NUM_PILOTS)]
        pilots[factor] = statistics.fmean(means)
    # A chain that diverges is the worst.
    best = min(pilots, key=lambda factor: _distance(pilots[factor], problem.truth.coefficient))
    start = time.process_time()
    seeds = range(1000 * seed + 1000, 1000 * seed + 1000 + settings.num_chains)
    means = [chain(module, problem, best / largest, number) for number in seeds]
    return {
        "mean": statistics.fmean(means),
        "error": statistics.stdev(means) / math.sqrt(len(means)),
        "seconds": time.process_time() - start,
        "gradients": settings.num_chains * settings.num_steps,
        "best": best,
        "pilots": pilots,
    }


def _distance(found: float, truth: float) -> float:
    return abs(found - truth) if math.isfinite(found) else math.inf
