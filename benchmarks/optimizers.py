"""Speed of `compat` against the published devinterp 2.0.1, side by side in one process.

One iteration of a plain training loop (zero_grad, forward, backward, step), and the step alone, on
an MLP 64-128-128-10 with batch 64, with and without metrics; medians, and ratios. The step size is
so small that all optimizers stay at the same parameters.

    make bench
"""

import warnings
from collections.abc import Callable
from typing import Any

import devinterp.optim
from measuring import arguments, environment, medians, write
from networks import perceptron, vectors
from torch.nn.functional import cross_entropy

import compat

SIZES, EXAMPLES = (64, 128, 128, 10), 64
SETTINGS = {"lr": 1e-9, "nbeta": 100.0}
LOCALIZED = {**SETTINGS, "localization": 1.0}
METHODS: dict[str, Callable[[Any, Any], Any]] = {
    "SGMCMC.sgld": lambda package, params: package.SGMCMC.sgld(params, **LOCALIZED),
    "SGMCMC.sgld, metrics": lambda package, params: package.SGMCMC.sgld(
        params, **LOCALIZED, save_metrics=True
    ),
    "SGMCMC.rmsprop_sgld": lambda package, params: package.SGMCMC.rmsprop_sgld(params, **LOCALIZED),
    "SGMCMC.rmsprop_sgld, metrics": lambda package, params: package.SGMCMC.rmsprop_sgld(
        params, **LOCALIZED, save_metrics=True
    ),
    "SGLD": lambda package, params: package.SGLD(params, **LOCALIZED),
    "SGLD, metrics": lambda package, params: package.SGLD(params, **LOCALIZED, save_metrics=True),
    "SGNHT": lambda package, params: package.SGNHT(params, **SETTINGS),
}


def loops(make: Callable[[Any], Any]) -> tuple[Callable[[], None], Callable[[], None]]:
    """One iteration of a training loop with an optimizer, and its step alone."""
    model, (inputs, targets) = perceptron(SIZES), vectors(SIZES, EXAMPLES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make(model.parameters())

    def iteration() -> None:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    iteration()
    return iteration, optimizer.step


def main() -> None:
    options = arguments(__doc__ or "", rounds=40)
    report = environment("devinterp") | {"milliseconds": {}}
    contenders: dict[str, Callable[[], None]] = {}
    for package in (compat, devinterp.optim):
        for method, make in METHODS.items():
            iteration, step = loops(
                lambda params, make=make, package=package: make(package, params)
            )
            contenders[f"{package.__name__} {method}: iteration"] = iteration
            contenders[f"{package.__name__} {method}: step"] = step
    figures = medians(contenders, options.rounds, repeats=5)
    report["milliseconds"] = figures
    for part in ("iteration", "step"):
        print(f"\n{part:30} compat ms  published ms  ratio")
        for method in METHODS:
            ours, theirs = (
                figures[f"{name} {method}: {part}"] for name in ("compat", "devinterp.optim")
            )
            print(f"{method:30} {ours:9.3f}  {theirs:12.3f}  {ours / theirs:5.2f}")
    print("\niteration with metrics / without    compat  published")
    for method in ("SGMCMC.sgld", "SGMCMC.rmsprop_sgld", "SGLD"):
        ratios = [
            figures[f"{name} {method}, metrics: iteration"] / figures[f"{name} {method}: iteration"]
            for name in ("compat", "devinterp.optim")
        ]
        print(f"{method:35} {ratios[0]:6.2f}  {ratios[1]:9.2f}")
    write(report, options.json)


if __name__ == "__main__":
    main()
