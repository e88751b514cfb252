"""Linear regression with Gaussian noise, whose learning coefficient is known at every n, nβ and γ.

    λ(nβ, γ) = (1/2) Σ_i nβ hᵢ/(nβ hᵢ + γ)

with hᵢ the eigenvalues of the inputs' second moments, around the least-squares solution.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

import funcsgmcmc as fs

N, D, GAMMA = 1000, 10, 1.0
NBETA = fs.default_nbeta(N)


def loss(params, batch):
    inputs, targets = batch
    return ((inputs @ params["w"] - targets) ** 2).mean() / 2


@dataclass
class Regression:
    data: tuple[torch.Tensor, torch.Tensor]
    start: dict[str, torch.Tensor]
    truth: float


def regression(seed: int = 0) -> Regression:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(N, D, generator=generator)
    noise = torch.randn(N, generator=generator)
    targets = inputs @ torch.randn(D, generator=generator) + noise
    start = {"w": torch.linalg.lstsq(inputs, targets[:, None]).solution[:, 0]}
    curvature = NBETA * torch.linalg.eigvalsh(inputs.T @ inputs / N)
    return Regression((inputs, targets), start, float((curvature / (curvature + GAMMA)).sum() / 2))


def sgld(lr: float) -> fs.samplers.Sampler:
    return fs.sgld(lr, nbeta=NBETA, localization=GAMMA)


def baoa(lr: float) -> fs.samplers.Sampler:
    """Of the step size that costs and mixes as SGLD's lr."""
    h = math.sqrt(lr / 2)
    return fs.baoa(h, friction=1 / h, nbeta=NBETA, localization=GAMMA)


def sampled(problem: Regression, sampler, loss_fn: Any = loss, **settings: Any) -> fs.Samples:
    options = {
        "num_chains": 32,
        "num_draws": 150,
        "num_burnin_steps": 300,
        "num_steps_between_draws": 4,
        "key": fs.key(1),
    }
    return fs.sample(loss_fn, problem.start, problem.data, sampler, **(options | settings))
