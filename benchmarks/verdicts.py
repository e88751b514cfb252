"""Are the verdicts of sweeps right? Twenty sweeps of problems whose learning coefficient is known.

    python benchmarks/verdicts.py [regression] [linear networks] [digits]

Linear regression at three batch sizes (in closed form), two deep linear networks (Aoyagi 2024) and
scikit-learn's digits (a long run of small steps). For each sweep: the recommended cell against the
value, and how far off the worst cell is that is called fine. Takes about ten minutes.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs
from funcsgmcmc.testing.truths import deep_linear

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import digits

# SGLD's step ε, and BAOA's h = √(ε/2) of the same cost.
SAMPLERS: dict[str, tuple[Callable[..., Any], Callable[[float], float]]] = {
    "SGLD": (fs.sgld, lambda lr: lr),
    "BAOA": (fs.baoa, lambda lr: math.sqrt(lr / 2)),
}


@dataclass
class Problem:
    """A problem of known value, and how it is swept."""

    name: str
    value: float
    loss_fn: Any
    start: Any
    data: Any
    lrs: list[float]
    nbeta: float
    localization: float
    run: dict[str, Any]

    def sweep(self, sampler: str, seed: int) -> Any:
        factory, step = SAMPLERS[sampler]
        return fs.sweep(
            self.loss_fn,
            self.start,
            self.data,
            factory,
            grid={
                "lr": [step(lr) for lr in self.lrs],
                "nbeta": self.nbeta,
                "localization": self.localization,
            },
            key=fs.key(seed),
            **{"chains_per_cell": 8, **self.run},
        )


def regression_loss(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return ((inputs @ params["w"] - targets) ** 2).mean() / 2


def regression(batch_size: int | None) -> Problem:
    torch.manual_seed(0)
    inputs = torch.randn(1000, 10, dtype=torch.float64)
    targets = inputs @ torch.randn(10).double() + torch.randn(1000, dtype=torch.float64)
    nbeta, pull = fs.default_nbeta(1000), 1.0
    curvature = nbeta * torch.linalg.eigvalsh(inputs.T @ inputs / 1000)
    return Problem(
        f"linear regression, batch {batch_size or 'all'}",
        float((curvature / (curvature + pull)).sum() / 2),
        regression_loss,
        {"w": torch.linalg.lstsq(inputs, targets[:, None]).solution[:, 0]},
        (inputs, targets),
        [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        nbeta,
        pull,
        {
            # Few parameters: a draw's estimate varies by half of it, and many are needed.
            "chains_per_cell": 16,
            "num_draws": 1000,
            "num_burnin_steps": 400,
            "num_steps_between_draws": 4,
            "batch_size": batch_size,
            "full_loss": 100,
        },
    )


def linear_network(widths: list[int], rank: int) -> Problem:
    """Targets W x with n = 10⁴, and all data in a step: the loss is that of the moments."""
    torch.manual_seed(0)
    number = 10_000
    inputs = torch.randn(number, widths[0], dtype=torch.float64)
    layers = []
    for into, out in pairwise(widths):
        # Of the network's rank, with singular values 1: active directions are all stiff.
        left = torch.linalg.qr(torch.randn(out, out, dtype=torch.float64)).Q
        layers.append(torch.zeros(out, into, dtype=torch.float64))
        layers[-1][:, :rank] = left[:, :rank] if out == widths[-1] else torch.eye(out)[:, :rank]
    truth = functools.reduce(lambda product, layer: layer @ product, layers)
    moment = inputs.T @ inputs / number

    def loss(params: Any, batch: Tensor) -> Tensor:
        product = functools.reduce(
            lambda found, index: params[f"w{index}"] @ found,
            range(1, len(layers)),
            params["w0"],
        )
        away = product - truth
        return ((away @ batch) * away).sum() / 2

    nbeta = fs.default_nbeta(number)
    scale = 1 / (nbeta * len(layers))
    return Problem(
        f"linear network {'-'.join(map(str, widths))} of rank {rank}",
        deep_linear(widths, rank).coefficient,
        loss,
        {f"w{index}": layer for index, layer in enumerate(layers)},
        [moment],
        [scale * factor for factor in (0.02, 0.1, 0.2, 0.4, 0.8)],
        nbeta,
        10.0,  # fills flat directions in 2/(ε γ) steps
        {
            "num_draws": 400,
            "num_burnin_steps": 2000 * (len(layers) - 1),
            "num_steps_between_draws": 6 * (len(layers) - 1),
            "full_loss": 100,
        },
    )


def digits_problems() -> Iterator[tuple[Problem, str]]:
    torch.manual_seed(0)
    images, labels = digits.load()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    digits.train(model, images, labels, epochs=600)
    loss_fn, start = fs.module_loss(model, cross_entropy), fs.params_of(model)
    nbeta = fs.default_nbeta(len(images))
    reference = fs.llc(
        fs.sample(
            fs.control_variates(loss_fn),
            start,
            (images, labels),
            fs.baoa(0.008, nbeta=nbeta, localization=100.0),
            num_chains=16,
            num_draws=800,
            num_burnin_steps=1500,
            num_steps_between_draws=4,
            batch_size=256,
            key=fs.key(100),
            full_loss=50,
        )
    )
    print(f"digits, reference: {reference}", flush=True)
    for batch_size, sampler, control in (
        (128, "SGLD", False),
        (512, "SGLD", False),
        (128, "BAOA", False),
        (128, "BAOA", True),
    ):
        yield (
            Problem(
                f"digits, batch {batch_size}{', control variates' if control else ''}",
                reference.corrected,
                fs.control_variates(loss_fn) if control else loss_fn,
                start,
                (images, labels),
                [1e-5, 5e-5, 2e-4, 5e-4, 1e-3, 4e-3],
                nbeta,
                100.0,
                {
                    "num_draws": 300,
                    "num_burnin_steps": 500,
                    "num_steps_between_draws": 3,
                    "batch_size": batch_size,
                    "full_loss": 30,
                },
            ),
            sampler,
        )


def judge(problem: Problem, sampler: str, seed: int) -> tuple[bool, bool]:
    """Whether the recommended cell is right, and whether all cells that are fine are."""
    swept = problem.sweep(sampler, seed)
    fine = [cell for cell in swept.cells if cell.verdict.name == "fine"]
    off = [abs(cell.llc.mean / problem.value - 1) for cell in fine]
    print(f"\n{problem.name}, {sampler}, seed {seed}: known value {problem.value:.4g}\n{swept}")
    if not fine:
        print(f"-> nothing is recommended: {swept.propose()}", flush=True)
        return False, True
    chosen = swept.recommend()
    estimate = chosen.cells[0].llc
    away = abs(estimate.mean - problem.value)
    is_right = away <= max(0.05 * problem.value, estimate.error)
    print(
        f"-> {chosen}\n-> {estimate.mean:.4g} ± {estimate.error:.2g} is off by "
        f"{away / problem.value:.1%}: {'right' if is_right else 'WRONG'}; "
        f"of {len(fine)} cells that are fine, the worst is off by {max(off):.1%}",
        flush=True,
    )
    return is_right, max(off) <= 0.15


def main() -> None:
    chosen = set(sys.argv[1:]) or {"regression", "linear networks", "digits"}
    tried: list[tuple[Problem, str]] = []
    if "regression" in chosen:
        for batch_size in (None, 100, 20):
            tried += [(regression(batch_size), sampler) for sampler in SAMPLERS] * 2
    if "linear networks" in chosen:
        for widths, rank in (([20, 12, 15], 10), ([10, 8, 12, 9, 10], 7)):
            tried += [(linear_network(widths, rank), sampler) for sampler in SAMPLERS]
    if "digits" in chosen:
        tried += list(digits_problems())
    # A key of its own for each: sweeps that share their noise are wrong together.
    found = [judge(problem, sampler, seed) for seed, (problem, sampler) in enumerate(tried)]
    right, sound = (sum(each) for each in zip(*found, strict=True))
    print(
        f"\n{right} of {len(found)} recommendations right; in {sound} no fine cell is off by 15 %"
    )


if __name__ == "__main__":
    main()
