"""H: `compat` against the published devinterp 2.0.1.

One iteration of a plain training loop (zero_grad, forward, backward, step), and the step alone, on
network A with one chain, with and without metrics. The step size is so small that all optimizers
stay at the same parameters.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import Call, medians
from networks import WORKLOADS, criterion

import compat

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


def loops(make: Callable[[Any], Any]) -> dict[str, Call]:
    """One iteration of a training loop with an optimizer, and its step alone."""
    model, (inputs, targets) = WORKLOADS["A"].make(), WORKLOADS["A"].batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make(model.parameters())

    def iteration() -> None:
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()

    iteration()
    return {"iteration": iteration, "step": optimizer.step}


def measure(rounds: int) -> dict[str, Any]:
    """Milliseconds by what is called, method and package."""
    import devinterp.optim

    packages = {"compat": compat, "published": devinterp.optim}
    contenders = {
        (part, method, name): call
        for method, make in METHODS.items()
        for name, package in packages.items()
        for part, call in loops(partial(make, package)).items()
    }
    torch.manual_seed(0)
    figures = medians({"|".join(key): call for key, call in contenders.items()}, rounds, repeats=5)
    report: dict[str, Any] = {"iteration": {}, "step": {}}
    for part, method, name in contenders:
        report[part].setdefault(method, {})[name] = figures[f"{part}|{method}|{name}"]
    for part, methods in report.items():
        for method, both in methods.items():
            ratio = both["compat"] / both["published"]
            print(f"  {part:10} {method:30} {ratio:5.2f} of the published", flush=True)
    return report
